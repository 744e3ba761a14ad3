"""TLS of the server: certificate, key and client authorities from files, for gRPC and for the metrics' HTTP server."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from .files import FileValue, SecurityError

CERT, KEY, CLIENT_CA = "--tls-cert", "--tls-key", "--tls-client-ca"


class _Loaded(NamedTuple):
    configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


class Tls:
    """Certificates in force. Each new connection gets the newest ones.

    Attributes:
        mutual: Whether clients need a certificate.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """Load the files.

        Args:
            cert: PEM file of the server's certificate, with the intermediate ones after it.
            key: PEM file of its private key, without a passphrase.
            client_ca: PEM file of the authorities that sign client certificates; makes them required.

        Raises:
            SecurityError: A file cannot be read or is not usable, or key and certificate do not match.
        """
        self.mutual = client_ca is not None
        paths = {CERT: cert, KEY: key}
        if client_ca is not None:
            paths[CLIENT_CA] = client_ca
        self._paths = paths
        self._files = FileValue(paths, self._load)
        self._given = self._files.value.configuration

    def refresh(self) -> None:
        """Load the files if they have changed."""
        self._files.refresh()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for gRPC's port, which follow the files."""
        # Its types leave out that the function may return None, which its documentation says.
        fetch: Any = self._fetch
        return grpc.dynamic_ssl_server_credentials(self._given, fetch, self.mutual)

    def context(self) -> ssl.SSLContext:
        """The context of new connections to other servers of the process."""
        return self._files.value.context

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, on a thread of its own, at each handshake. ``None``: no change since the last call."""
        newest = self._files.value.configuration
        if newest is self._given:
            return None
        self._given = newest
        return newest

    def _load(self, contents: Mapping[str, bytes]) -> _Loaded:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # Without a function, OpenSSL asks for the passphrase at the terminal.
            context.load_cert_chain(self._paths[CERT], self._paths[KEY], password=_refuse_passphrase)
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise SecurityError(
                f"{CERT} {self._paths[CERT]} and {KEY} {self._paths[KEY]}: are not a certificate and its key, in "
                f"PEM format: {reason}"
            ) from error
        if self.mutual:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self._paths[CLIENT_CA])
            except (ssl.SSLError, OSError) as error:
                reason = getattr(error, "reason", None) or error
                raise SecurityError(
                    f"{CLIENT_CA} {self._paths[CLIENT_CA]}: holds no certificates in PEM format: {reason}"
                ) from error
        configuration = grpc.ssl_server_certificate_configuration(
            [(contents[KEY], contents[CERT])], root_certificates=contents.get(CLIENT_CA)
        )
        return _Loaded(configuration, context)


def _refuse_passphrase() -> str:
    raise SecurityError(f"{KEY}: the private key has a passphrase; give a key without one")
