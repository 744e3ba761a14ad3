"""Addresses of rerankers: the forms that users may write, read into gRPC's own."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

_FORMS = (
    "right forms are 'host:port', '[IPv6]:port', 'grpc://host:port', 'grpcs://host:port' (TLS), "
    "gRPC's own ('dns:///host:port', 'ipv4:1.2.3.4:port', 'ipv6:[::1]:port', 'unix:/path', 'unix-abstract:name', "
    "'xds:///service'), several of the first four with commas between them, or a list of these"
)
_NATIVE_SCHEMES = frozenset({"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds"})
_SCHEME = re.compile(r"([a-z][a-z0-9+.\-]*):", re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-f:.%a-z]+\]|[^\s:/\[\]@?#,]+):(?P<port>[0-9]{1,5})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Address:
    """The address of one server, or one name for several.

    Attributes:
        target: The address as gRPC's channels take it.
        secure: Whether the connection uses TLS.
        authority: ``host:port`` of the host name that ``target`` was found for; None for an address that a user wrote.
        copy: Number of equal addresses before this one in a list: a job then opens a stream for each, which a proxy may
            send to different servers.
    """

    target: str
    secure: bool
    authority: str | None = None
    copy: int = 0

    @property
    def name(self) -> tuple[str, int] | None:
        """Host name and port, if the address names a host that has to be resolved; ``localhost`` has not."""
        scheme, separator, rest = self.target.partition(":///")
        target = rest if separator and scheme.lower() == "dns" else self.target
        if not _is_host_and_port(target) or _is_loopback(target):
            return None
        host, _, port = target.rpartition(":")
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return None if host.lower() in _NATIVE_SCHEMES or host.startswith("[") else (host, int(port))
        return None

    def at(self, ip: str) -> Address:
        """Return one of the IP addresses of this address's host name."""
        assert self.name is not None
        host, port = self.name
        return replace(self, target=f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}", authority=f"{host}:{port}")

    @property
    def local(self) -> bool:
        """Whether the address is certain to be on this machine: a loopback address, or a socket of its file system."""
        scheme, _, rest = self.target.partition(":")
        if scheme in ("unix", "unix-abstract"):
            return True
        if scheme == "dns" and not _is_host_and_port(self.target):
            rest = rest.rpartition("/")[2]  # an authority before it is the name server
        elif scheme not in ("ipv4", "ipv6"):
            rest = self.target
        return all(_is_loopback(one) for one in rest.split(","))

    def __str__(self) -> str:
        written = f"grpcs://{self.target}" if self.secure else self.target
        return written if self.authority is None else f"{written} ({self.authority.rpartition(':')[0]})"


def parse_addresses(address: str | Sequence[str]) -> tuple[Address, ...]:
    """Read one address, several with commas between them, or a list of them.

    Raises:
        ValueError: An address has none of the right forms, or the list is empty.
        TypeError: An address is not a string.
    """
    addresses = _split(address) if isinstance(address, str) else list(address)
    if not addresses:
        raise ValueError(f"the list of addresses is empty: {_FORMS}")
    seen: Counter[Address] = Counter()
    parsed = []
    for one in map(_parse, addresses):
        parsed.append(replace(one, copy=seen[one]))
        seen[one] += 1
    return tuple(parsed)


def _split(text: str) -> list[str]:
    named = _SCHEME.match(text)
    if named and named[1].lower() in _NATIVE_SCHEMES and not _is_host_and_port(text.partition(",")[0]):
        return [text]  # gRPC's own forms may have commas inside
    return text.split(",")


def _parse(address: str) -> Address:
    if not isinstance(address, str):
        raise TypeError(f"an address is a string, not {address!r}: {_FORMS}")
    scheme, separator, rest = address.partition("://")
    if separator and scheme.lower() in ("grpc", "grpcs"):
        return Address(_host_and_port(rest.removesuffix("/"), address), secure=scheme.lower() == "grpcs")
    named = _SCHEME.match(address)
    if named and named[1].lower() in _NATIVE_SCHEMES and not _is_host_and_port(address):
        if len(address.strip(":/ ")) <= len(named[1]) or any(character.isspace() for character in address):
            raise ValueError(f"address {address!r} names no server: {_FORMS}")
        return Address(address, secure=False)
    return Address(_host_and_port(address, address), secure=False)


def _is_loopback(host_and_port: str) -> bool:
    host = host_and_port.rpartition(":")[0].strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_host_and_port(text: str) -> bool:
    found = _HOST_AND_PORT.fullmatch(text)
    return found is not None and 0 < int(found["port"]) < 65536


def _host_and_port(text: str, address: str) -> str:
    if not _is_host_and_port(text):
        raise ValueError(f"address {address!r} is not understood: {_FORMS}")
    return text
