"""Commands of the pages under docs/, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def shell_blocks(page: str, containing: str) -> list[str]:
    """The blocks of shell commands on a page of docs/ that contain a text."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for block in blocks if containing in block]
