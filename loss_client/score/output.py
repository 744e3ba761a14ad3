"""Output of scored rows: a file of JSON lines that a stopped run continues, and a file that says how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loss_client.rows import Row


class OutputError(ValueError):
    """The output exists and cannot be continued; the message says why."""


class Output:
    """A file of JSON lines, open at its end.

    Terminology: the *run file* is beside the output, with ``.run.json`` added to its name. It holds the settings of the
    run and the model's fingerprint, so that a file never has scores of two models or of two settings.

    Args:
        path: The output. If it exists, its complete lines are kept, and a last line without its end is dropped.
        settings: What the scores depend on, as JSON values.
        overwrite: Whether an existing output is replaced instead.

    Attributes:
        written: Complete rows in the output.
        last: The last of them; ``None`` without any.
        fingerprint: Fingerprint of the model that gave the scores; ``None`` before the first.

    Raises:
        OutputError: The output exists and was made with other settings, or not by this command.
        OSError: A file cannot be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self._path, self._run, self._settings = path, path.with_name(f"{path.name}.run.json"), settings
        self.written = 0
        self.last: Row | None = None
        self.fingerprint: str | None = None
        if overwrite:
            path.unlink(missing_ok=True)
            self._run.unlink(missing_ok=True)
        if path.exists() and path.stat().st_size:
            self._continue()
        else:
            self._save()
        self._file = path.open("ab")

    def _continue(self) -> None:
        if not self._run.exists():
            raise OutputError(f"{self._path} exists and was not made by this command: choose another name")
        found = json.loads(self._run.read_text(encoding="utf-8"))
        self.fingerprint = found.pop("fingerprint")
        names = sorted(name for name in found.keys() | self._settings if found.get(name) != self._settings.get(name))
        if names:
            differences = ", ".join(f"{name} {found.get(name)!r}, not {self._settings.get(name)!r}" for name in names)
            raise OutputError(
                f"{self._path} was begun with {differences}: run with the same settings, choose another name, or give "
                "--overwrite"
            )
        end, line = 0, b""
        with self._path.open("r+b") as file:
            for line_now in file:
                if not line_now.endswith(b"\n"):
                    break
                end, line = end + len(line_now), line_now
                self.written += 1
            file.truncate(end)
        self.last = json.loads(line) if line else None

    def use(self, fingerprint: str | None) -> None:
        """Note the model that gives the scores, before the first of them is written."""
        if self.fingerprint is None and fingerprint is not None:
            self.fingerprint = fingerprint
            self._save()

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows; they are in the file when this returns."""
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        self.written += len(lines)

    def _save(self) -> None:
        text = json.dumps({**self._settings, "fingerprint": self.fingerprint}, ensure_ascii=False, indent=2)
        partial = self._run.with_name(f"{self._run.name}.partial")
        partial.write_text(f"{text}\n", encoding="utf-8")
        os.replace(partial, self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
