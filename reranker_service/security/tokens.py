"""Tokens of clients: read from a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from pathlib import Path

import structlog

from .files import FileValue, SecurityError

FLAG = "--token-file"
SHORTEST = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(rf"[A-Za-z0-9._~+/-]{{{SHORTEST},512}}=*")  # token68 of RFC 7235
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_LINE = "a line is 'NAME TOKEN' or 'NAME sha256:HEX'"

log = structlog.get_logger()


class Tokens:
    """Tokens in force, each with the name of its client.

    A line of the file is ``NAME TOKEN`` or ``NAME sha256:HEX``, the SHA-256 of the token in hexadecimal. Empty lines
    and lines that begin with ``#`` are ignored. A name may have several tokens, so that a client can change from one
    to the next.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; warn if others than its owner and group can read it.

        Raises:
            SecurityError: The file cannot be read, has a wrong line, or holds no token.
        """
        self._file = FileValue({FLAG: path}, lambda contents: _parse(path, contents[FLAG]))
        if not self._file.value:
            raise SecurityError(f"{FLAG} {path}: holds no token, so that all calls would be refused; {_LINE}")
        if path.stat().st_mode & stat.S_IROTH:
            log.warning("every user of this machine can read the token file; chmod 600 is right", path=str(path))

    def refresh(self) -> None:
        """Read the file if it has changed. A file without tokens is valid then: it revokes all of them."""
        if self._file.refresh() and not self._file.value:
            log.warning("the token file holds no token; all calls are refused")

    def find(self, token: str) -> str | None:
        """The name of the client that has ``token``; ``None`` if it is not in force.

        The time depends on the number of tokens in force, not on their content: digests of equal length are compared,
        and always all of them.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self._file.value:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _parse(path: Path, content: bytes) -> tuple[tuple[bytes, str], ...]:
    """Read (digest, name) of each line. Errors name the line, never its token."""
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise SecurityError(f"{FLAG} {path}: is not UTF-8 text; {_LINE}") from error
    tokens = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        at = f"{FLAG} {path}, line {number}"
        if len(words) != 2:
            raise SecurityError(f"{at}: has {len(words)} words; {_LINE}")
        name, token = words
        if not _NAME.fullmatch(name):
            raise SecurityError(f"{at}: the name must be 1 to 64 letters, digits, '.', '_' or '-'; {_LINE}")
        if token.lower().startswith("sha256:"):
            digest = _DIGEST.fullmatch(token)
            if digest is None:
                raise SecurityError(f"{at}: sha256: must be followed by 64 hexadecimal digits")
            tokens.append((bytes.fromhex(digest[1]), name))
        elif _TOKEN.fullmatch(token):
            tokens.append((hashlib.sha256(token.encode()).digest(), name))
        else:
            raise SecurityError(
                f"{at}: a token must be {SHORTEST} to 512 letters, digits or '._~+/-', with '=' only at its end; "
                "`openssl rand -hex 32` makes a good one"
            )
    return tuple(tokens)
