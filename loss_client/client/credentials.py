"""Credentials of a client: its token, and the certificates of its TLS connections."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from os import PathLike
from pathlib import Path
from typing import Any, Self

import grpc

from loss_client.client.addresses import Address

TOKEN, TOKEN_FILE = "RERANKER_CLIENT_TOKEN", "RERANKER_CLIENT_TOKEN_FILE"
TLS_CA, TLS_CERT, TLS_KEY = "RERANKER_CLIENT_TLS_CA", "RERANKER_CLIENT_TLS_CERT", "RERANKER_CLIENT_TLS_KEY"
# The characters that a header may carry. A wrong character is reported here, because gRPC's error would show the token.
_TOKEN = re.compile(r"[!-~]{1,4096}")

Pem = bytes | str | PathLike[str]
"""PEM data, or the path of a file with it."""


class Secret:
    """A text that ``repr``, ``print`` and ``pickle`` do not show.

    Only a process that ``multiprocessing`` is starting gets it by pickle, as it gets the parent's ``authkey``.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(...)"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            raise TypeError(
                "a client with a token or private key as an argument cannot be pickled, because the pickle would show "
                f"it: give the token as token_file or in {TOKEN}, and the key as the path of its file"
            )
        return Secret, (self._text,)


class TokenSource:
    """A token from an argument or a variable, or from a file that is read again when it has changed.

    Args:
        origin: Where the token is from, for error messages.
        argument: The token, if it was an argument.
        variable: The token, if a variable of the environment has it; copies by pickle read their own environment.
        path: The file of the token.
    """

    def __init__(
        self, origin: str, *, argument: Secret | None = None, variable: Secret | None = None, path: Path | None = None
    ) -> None:
        self.origin = origin
        self._argument = argument
        self._path = path
        self._found = argument or variable
        self._signature: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"TokenSource({self.origin!r})"

    def token(self) -> str:
        """The token.

        Raises:
            ValueError: The file cannot be read, or holds anything but one token.
        """
        if self._path is not None:
            try:
                now = self._path.stat()
                signature = (now.st_mtime_ns, now.st_size, now.st_ino)
                if signature != self._signature:
                    self._found = _checked(self._path.read_text(encoding="utf-8", errors="replace"), self.origin)
                    self._signature = signature
            except OSError as error:
                raise ValueError(f"{self.origin} cannot be read: {error.strerror}") from error
        assert self._found is not None
        return self._found.reveal()

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``RerankerClient`` that lead to this token; none if a variable has it."""
        if self._argument is not None:
            return {"token": self._argument.reveal()}
        return {} if self._path is None else {"token_file": self._path}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": self._argument, "_signature": ()}


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials for all addresses of a client.

    Attributes:
        token: The token, if there is one.
        plaintext_token: Whether it may be sent to another machine without TLS.
        root_certificates: Authorities that TLS trusts; ``None`` for gRPC's own.
        certificate: The client's certificate chain, for mutual TLS.
        key: Its private key.
    """

    token: TokenSource | None = None
    plaintext_token: bool = False
    root_certificates: Pem | None = None
    certificate: Pem | None = None
    key: Path | Secret | None = None

    def channel(self) -> grpc.ChannelCredentials:
        """Credentials for a TLS channel; files are read now.

        Raises:
            ValueError: A file cannot be read, or is not PEM.
        """
        key = self.key.reveal().encode() if isinstance(self.key, Secret) else self.key
        return grpc.ssl_channel_credentials(
            _pem("root_certificates", self.root_certificates),
            _pem("client_key", key),
            _pem("client_certificate", self.certificate),
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a call. Raises ``ValueError`` if the token's file is unusable."""
        return () if self.token is None else (("authorization", f"Bearer {self.token.token()}"),)

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``RerankerClient`` that make equal credentials."""
        return {
            **({} if self.token is None else self.token.arguments()),
            "plaintext_token": self.plaintext_token,
            "root_certificates": self.root_certificates,
            "client_certificate": self.certificate,
            "client_key": self.key.reveal().encode() if isinstance(self.key, Secret) else self.key,
        }


def make_credentials(
    addresses: tuple[Address, ...],
    *,
    token: str | None,
    token_file: str | PathLike[str] | None,
    plaintext_token: bool,
    root_certificates: Pem | None,
    client_certificate: Pem | None,
    client_key: Pem | None,
) -> Credentials:
    """Make credentials from arguments, and from the environment where an argument is not given.

    Raises:
        ValueError: Arguments contradict each other, a file is unusable, or the token would cross a network in
            plaintext. The message holds no token.
    """
    source = _token_source(token, token_file)
    exposed = [str(address) for address in addresses if not address.secure and not address.local]
    if source is not None and exposed and not plaintext_token:
        raise ValueError(
            f"{source.origin} is given, but {', '.join(exposed)} is reached without TLS, so that the network can "
            "read the token: write the address as 'grpcs://host:port', or set plaintext_token=True where a tunnel or a "
            "service mesh encrypts the connection"
        )
    if not any(address.secure for address in addresses):
        given = {
            "root_certificates": root_certificates,
            "client_certificate": client_certificate,
            "client_key": client_key,
        }
        for name, value in given.items():
            if value is not None:
                verb = "are" if name.endswith("s") else "is"
                raise ValueError(f"{name} {verb} given but no address uses TLS: write it as 'grpcs://host:port'")
        return Credentials(source, plaintext_token)
    roots = _or_variable(root_certificates, TLS_CA)
    certificate, key = _or_variable(client_certificate, TLS_CERT), _or_variable(client_key, TLS_KEY)
    if (certificate is None) != (key is None):
        raise ValueError(
            f"a client certificate needs its private key: give client_certificate and client_key, or {TLS_CERT} and "
            f"{TLS_KEY}"
        )
    hidden: Path | Secret | None = None
    if key is not None:
        hidden = Secret(key.decode("ascii", "replace")) if isinstance(key, bytes) else Path(key)
    credentials = Credentials(source, plaintext_token, roots, certificate, hidden)
    credentials.channel()  # unusable files are errors of the constructor
    return credentials


def _token_source(token: str | None, token_file: str | PathLike[str] | None) -> TokenSource | None:
    if token is not None and token_file is not None:
        raise ValueError("token and token_file are both given; give one of them")
    if token is not None:
        return TokenSource("the argument token", argument=_checked(token, "the argument token"))
    if token_file is None and (found := os.environ.get(TOKEN)):
        return TokenSource(f"the token of {TOKEN}", variable=_checked(found, TOKEN))
    path = token_file if token_file is not None else os.environ.get(TOKEN_FILE)
    if not path:
        return None
    name = "token_file" if token_file is not None else TOKEN_FILE
    source = TokenSource(f"the token of {name} {os.fspath(path)}", path=Path(path).absolute())
    source.token()
    return source


def _checked(text: str, name: str) -> Secret:
    text = text.strip()
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"{name}: a token is one word of printable ASCII characters, and this is none")
    return Secret(text)


def _or_variable(value: Pem | None, variable: str) -> Pem | None:
    return value if value is not None else os.environ.get(variable) or None


def _pem(name: str, value: Pem | None) -> bytes | None:
    if value is None:
        return None
    at = name if isinstance(value, bytes) else f"{name} {os.fspath(value)!r}"
    try:
        content = value if isinstance(value, bytes) else Path(value).read_bytes()
    except OSError as error:
        raise ValueError(f"{at} cannot be read: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise ValueError(f"{at} is not in PEM format")
    return content
