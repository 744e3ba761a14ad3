"""Certificates, tokens and channels for tests of TLS."""

from __future__ import annotations

from pathlib import Path

import grpc
import trustme


class Authority:
    """A certificate authority with files of its own in ``directory``.

    Attributes:
        ca: File of its certificate.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, identity: str = "127.0.0.1") -> tuple[Path, Path]:
        """Make a certificate; returns the files of (certificate, key). A second one of a name replaces the first."""
        issued = self._authority.issue_cert(identity, key_type=trustme.KeyType.ECDSA)
        cert, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key


def channel(address: str, ca: Path | None = None, client: tuple[Path, Path] | None = None) -> grpc.Channel:
    """A channel: plaintext without ``ca``, TLS with it, mutual TLS with the files of ``client`` too."""
    if ca is None:
        return grpc.insecure_channel(address)
    cert, key = (path.read_bytes() for path in client) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)
    # Equal channels of a process share a connection; rotation is seen only by a new one.
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(address, credentials, options=options)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata with a token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
