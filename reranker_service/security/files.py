"""Files that a running server reads again when their content changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger()


class SecurityError(Exception):
    """The server must not start: a file is unusable, or flags leave it open. The message names the flag."""


def read_file(flag: str, path: Path) -> bytes:
    """Read a file that a flag names. Raises ``SecurityError``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecurityError(f"{flag} {path}: cannot be read: {error.strerror}") from error


class FileValue(Generic[T]):
    """A value made from files; the last usable one if the files have become unusable.

    Attributes:
        value: The value in force.
    """

    def __init__(self, paths: Mapping[str, Path], make: Callable[[Mapping[str, bytes]], T]) -> None:
        """Read the files and make the first value.

        Args:
            paths: The files, by their flags.
            make: Makes the value from the contents, by flag. Raises ``SecurityError``.

        Raises:
            SecurityError: A file cannot be read, or ``make`` refuses the contents.
        """
        self._paths = paths
        self._make = make
        self._seen: Mapping[str, bytes] | str = self._read()  # contents, or the reason why there are none
        self.value = make(self._seen)

    def refresh(self) -> bool:
        """Read the files, and make a new value if a content has changed. Returns whether there is a new value.

        Contents are compared, not times: a file may be rewritten within one tick of the file system's clock. A change
        that is unusable is logged once.
        """
        try:
            contents = self._read()
        except SecurityError as error:
            if str(error) != self._seen:
                self._seen = str(error)
                self._refuse(error)
            return False
        if contents == self._seen:
            return False
        self._seen = contents
        try:
            self.value = self._make(contents)
        except SecurityError as error:
            self._refuse(error)
            return False
        log.info("files read again", flags=" ".join(self._paths))
        return True

    def _read(self) -> dict[str, bytes]:
        return {flag: read_file(flag, path) for flag, path in self._paths.items()}

    @staticmethod
    def _refuse(error: SecurityError) -> None:
        log.error("changed files are not used; those read before stay in force", reason=str(error))
