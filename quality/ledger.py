"""What the study has found so far, on disk after every finding, so that an interrupted study goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Ledger:
    """Records with keys, one a line of a file.

    Args:
        path: The file; made with the first record.
        digest: Of the plan. Records of other plans stay in the file and are not seen.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._records: dict[tuple[str, ...], Record] = {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A last line without its end was being written when the study was ended.
            for line in lines:
                if line.endswith("\n") and (entry := json.loads(line))["plan"] == digest:
                    self._records[tuple(entry["key"])] = entry["record"]
            if lines and not lines[-1].endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._records

    def add(self, key: tuple[str, ...], record: Record) -> None:
        """Keep a record, in memory and on disk."""
        self._records[key] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"plan": self._digest, "key": key, "record": record}) + "\n")

    def under(self, *begin: str) -> dict[tuple[str, ...], Record]:
        """All records whose keys begin so, by the rest of their keys, in the order of their finding."""
        size = len(begin)
        return {key[size:]: record for key, record in self._records.items() if key[:size] == begin}
