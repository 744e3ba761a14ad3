"""Rows of Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CODE_OR_BAR = re.compile(r"(`[^`]*`)|\|")


def row(cells: Iterable[str]) -> str:
    """Return a row; bars in cells are escaped, except in code, where the site would show the escape."""
    escaped = (_CODE_OR_BAR.sub(lambda found: found[1] or "\\|", cell) for cell in cells)
    return f"| {' | '.join(escaped)} |"
