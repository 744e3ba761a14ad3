"""Access to a server: the flags for TLS and tokens, and connections that use them."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import ssl
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

# The variables of loss_client's RerankerClient, so that one set of them serves the client and the commands.
_VARIABLES = {
    "token": "RERANKER_CLIENT_TOKEN",
    "token_file": "RERANKER_CLIENT_TOKEN_FILE",
    "tls_ca": "RERANKER_CLIENT_TLS_CA",
    "tls_cert": "RERANKER_CLIENT_TLS_CERT",
    "tls_key": "RERANKER_CLIENT_TLS_KEY",
}
_TOKEN = re.compile(r"[!-~]{1,4096}")
_WEB_SECONDS = 5.0


class AccessError(ValueError):
    """An address, a file or a combination of flags cannot be used; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for TLS and tokens, which ``Access.of`` reads."""
    group = parser.add_argument_group("TLS and tokens")
    group.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help=f"PEM file of the authorities that TLS trusts; turns TLS on. Default: {_VARIABLES['tls_ca']}, or the "
        "system's authorities for addresses with grpcs:// or https://",
    )
    group.add_argument(
        "--tls-cert",
        type=Path,
        metavar="FILE",
        help=f"PEM file of this client's certificate, for mutual TLS. Default: {_VARIABLES['tls_cert']}",
    )
    group.add_argument(
        "--tls-key",
        type=Path,
        metavar="FILE",
        help=f"PEM file of the private key of --tls-cert. Default: {_VARIABLES['tls_key']}",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds a token and nothing else. Default: {_VARIABLES['token_file']}, or the token in "
        f"{_VARIABLES['token']}",
    )
    group.add_argument(
        "--plaintext-token", action="store_true", help="send the token to another machine without TLS, too"
    )


@dataclass(frozen=True, slots=True)
class Access:
    """Certificates and token of a command.

    Attributes:
        tls: Whether TLS is used for addresses that do not say so themselves.
        ca: Authorities that TLS trusts; ``None`` for the system's.
        cert: This client's certificate, for mutual TLS.
        key: Its private key.
        token: Token that is sent with every request.
        plaintext_token: Whether the token may be sent to another machine without TLS.
    """

    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str | None = None
    plaintext_token: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> Access:
        """Read the flags, and the environment where a flag is not given.

        Raises:
            AccessError: A file is unusable, or a certificate has no key.
        """
        ca, cert, key = (
            getattr(options, name) or _path(os.environ.get(_VARIABLES[name]))
            for name in ("tls_ca", "tls_cert", "tls_key")
        )
        for name, path in (("--tls-ca", ca), ("--tls-cert", cert), ("--tls-key", key)):
            if path is not None and not path.is_file():
                raise AccessError(f"{name} {path} is no file")
        if (cert is None) != (key is None):
            raise AccessError("a client certificate needs its private key: give --tls-cert and --tls-key")
        token = None
        if options.token_file is None and os.environ.get(_VARIABLES["token"]):
            token = _checked(os.environ[_VARIABLES["token"]], _VARIABLES["token"])
        elif path := options.token_file or _path(os.environ.get(_VARIABLES["token_file"])):
            try:
                token = _checked(path.read_text(encoding="utf-8", errors="replace"), f"--token-file {path}")
            except OSError as error:
                raise AccessError(f"--token-file {path} cannot be read: {error.strerror}") from error
        return cls(options.tls_ca is not None, ca, cert, key, token, options.plaintext_token)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channel(self, address: str) -> aio.Channel:
        """Make a channel to ``HOST:PORT``, ``grpc://HOST:PORT``, ``grpcs://HOST:PORT`` (TLS), or a form of gRPC's own.

        Raises:
            AccessError: The address has none of these forms, or the token would be sent to another machine without TLS.
        """
        scheme, separator, rest = address.partition("://")
        if separator and scheme in ("grpc", "grpcs"):
            secure, target = scheme == "grpcs", rest.removesuffix("/")
        else:
            secure, target = self.tls, address
        if ":" not in target or any(character.isspace() for character in target):
            raise AccessError(f"address {address!r} is not understood: write HOST:PORT, or grpcs://HOST:PORT for TLS")
        self._guard_token(target, secure)
        options = [("grpc.max_receive_message_length", -1)]
        if not secure:
            return aio.insecure_channel(target, options=options)
        ca, key, cert = (None if path is None else path.read_bytes() for path in (self.ca, self.key, self.cert))
        return aio.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options=options)

    def get(self, address: str) -> str:
        """Read a page of ``HOST:PORT``, ``http://HOST:PORT`` or ``https://HOST:PORT``.

        Raises:
            AccessError: The address has none of these forms, or the token would be sent to another machine without TLS.
            OSError: The page could not be read.
        """
        scheme, separator, rest = address.partition("://")
        if not separator:
            scheme, rest = "https" if self.tls else "http", address
        host = rest.partition("/")[0]
        if scheme not in ("http", "https") or ":" not in host:
            raise AccessError(f"address {address!r} is not understood: write HOST:PORT of the server's --metrics-port")
        self._guard_token(host, scheme == "https")
        request = urllib.request.Request(f"{scheme}://{rest}")
        for key, value in self.metadata:
            request.add_unredirected_header(key.title(), value)
        context = None
        if scheme == "https":
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        with urllib.request.urlopen(request, timeout=_WEB_SECONDS, context=context) as response:
            page: bytes = response.read()
        return page.decode()

    def _guard_token(self, target: str, secure: bool) -> None:
        if self.token is None or secure or self.plaintext_token or _is_local(target):
            return
        raise AccessError(
            f"a token is given, but {target} is reached without TLS, so that the network can read the token: give "
            "--tls-ca or an address with TLS (grpcs:// or https://), or --plaintext-token where a tunnel encrypts it"
        )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _checked(text: str, name: str) -> str:
    # gRPC's error for a character that a header cannot carry would show the token.
    if not _TOKEN.fullmatch(text.strip()):
        raise AccessError(f"{name}: a token is one word of printable ASCII characters, and this is none")
    return text.strip()


def _is_local(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
