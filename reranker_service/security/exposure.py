"""Exposure: which addresses other machines can reach, and the protection that they need."""

from __future__ import annotations

import ipaddress
import socket

from .files import SecurityError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``, an address or a name; ``False`` for a name that is not resolved."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)


def check_exposure(host: str, *, tls: bool, tokens: bool, mutual: bool) -> None:
    """Refuse an address beyond loopback that is not protected. Raises ``SecurityError``."""
    if mutual or (tls and tokens) or is_loopback(host):
        return
    missing = "--token-file" if tls else "--tls-cert and --tls-key" if tokens else "--tls-cert, --tls-key, --token-file"
    other = "--tls-client-ca" if tls else "--tls-cert, --tls-key and --tls-client-ca"
    raise SecurityError(
        f"--host {host}: other machines can reach this address; give {missing} too, or for mutual TLS {other}, or "
        "listen on 127.0.0.1. --insecure-network listens without protection"
    )
