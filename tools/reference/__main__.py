"""Program: writes the generated parts of docs/reference/ into a directory, from which the site's pages include them.

python -m tools.reference build/reference

Needs an environment in which the project's programs run, because it asks them for their ``--help``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.reference.commands import commands_page
from tools.reference.contract import contract_page
from tools.reference.names import names_page

ROOT = Path(__file__).parent.parent.parent


def main(directory: Path) -> None:
    """Write the three pages into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    pages = {
        "python.md": names_page(ROOT / "loss_client"),
        "commands.md": commands_page(),
        "contract.md": contract_page((ROOT / "protos" / "reranker" / "v1" / "reranker.proto").read_text()),
    }
    for name, text in pages.items():
        (directory / name).write_text(text)
        print(f"Written: {directory / name}, {len(text.splitlines())} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
