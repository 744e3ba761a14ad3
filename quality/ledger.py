"""Ledger: the study's results, saved one by one, so that an interrupted study continues where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Ledger:
    """Results by key, one a line of a JSON Lines file.

    Args:
        path: File; created with the first record.
        digest: Digest of the plan. Records of other plans stay in the file, but are not read.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._records: dict[tuple[str, ...], Record] = {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A last line without a line break is incomplete: the study was ended while it was written.
            for line in lines:
                if line.endswith("\n") and (entry := json.loads(line))["plan"] == digest:
                    self._records[tuple(entry["key"])] = entry["record"]
            if lines and not lines[-1].endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._records

    def add(self, key: tuple[str, ...], record: Record) -> None:
        """Save a record, in memory and on disk."""
        self._records[key] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"plan": self._digest, "key": key, "record": record}) + "\n")

    def under(self, *begin: str) -> dict[tuple[str, ...], Record]:
        """Return the records whose keys begin with ``begin``, by the rest of their keys, in the order of addition."""
        size = len(begin)
        return {key[size:]: record for key, record in self._records.items() if key[:size] == begin}
