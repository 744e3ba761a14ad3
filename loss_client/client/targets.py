"""Addresses of rerankers: the forms that users may write, read into targets for gRPC."""

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
class Target:
    """The address of one server, or one name for several.

    Attributes:
        address: The address in gRPC's form.
        secure: Whether the connection uses TLS.
        authority: ``host:port`` of the host name that ``address`` was found for; None for an address that a user wrote.
        copy: Number of equal addresses before this one in a list: a job then opens a stream for each, which a proxy may
            send to different servers.
    """

    address: str
    secure: bool
    authority: str | None = None
    copy: int = 0

    @property
    def name(self) -> tuple[str, int] | None:
        """Host name and port, if the address names a host that has to be resolved; ``localhost`` has not."""
        scheme, separator, rest = self.address.partition(":///")
        address = rest if separator and scheme.lower() == "dns" else self.address
        if not _is_host_and_port(address) or _is_loopback(address):
            return None
        host, _, port = address.rpartition(":")
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return None if host.lower() in _NATIVE_SCHEMES or host.startswith("[") else (host, int(port))
        return None

    def at(self, ip: str) -> Target:
        """Return the target of one of the IP addresses of this target's host name."""
        assert self.name is not None
        host, port = self.name
        return replace(self, address=f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}", authority=f"{host}:{port}")

    @property
    def local(self) -> bool:
        """Whether the address is certain to be on this machine: a loopback address, or a socket of its file system."""
        scheme, _, rest = self.address.partition(":")
        if scheme in ("unix", "unix-abstract"):
            return True
        if scheme == "dns" and not _is_host_and_port(self.address):
            rest = rest.rpartition("/")[2]  # an authority before it is the name server
        elif scheme not in ("ipv4", "ipv6"):
            rest = self.address
        return all(_is_loopback(one) for one in rest.split(","))

    def __str__(self) -> str:
        written = f"grpcs://{self.address}" if self.secure else self.address
        return written if self.authority is None else f"{written} ({self.authority.rpartition(':')[0]})"


def parse_targets(target: str | Sequence[str]) -> tuple[Target, ...]:
    """Read one address, several with commas between them, or a list of them.

    Raises:
        ValueError: An address has none of the right forms, or the list is empty.
        TypeError: An address is not a string.
    """
    addresses = _split(target) if isinstance(target, str) else list(target)
    if not addresses:
        raise ValueError(f"the list of targets is empty: {_FORMS}")
    seen: Counter[Target] = Counter()
    targets = []
    for address in addresses:
        parsed = _parse(address)
        targets.append(replace(parsed, copy=seen[parsed]))
        seen[parsed] += 1
    return tuple(targets)


def _split(text: str) -> list[str]:
    named = _SCHEME.match(text)
    if named and named[1].lower() in _NATIVE_SCHEMES and not _is_host_and_port(text.partition(",")[0]):
        return [text]  # gRPC's own forms may have commas inside
    return text.split(",")


def _parse(address: str) -> Target:
    if not isinstance(address, str):
        raise TypeError(f"a target is a string, not {address!r}: {_FORMS}")
    scheme, separator, rest = address.partition("://")
    if separator and scheme.lower() in ("grpc", "grpcs"):
        return Target(_host_and_port(rest.removesuffix("/"), address), secure=scheme.lower() == "grpcs")
    named = _SCHEME.match(address)
    if named and named[1].lower() in _NATIVE_SCHEMES and not _is_host_and_port(address):
        if len(address.strip(":/ ")) <= len(named[1]) or any(character.isspace() for character in address):
            raise ValueError(f"target {address!r} names no server: {_FORMS}")
        return Target(address, secure=False)
    return Target(_host_and_port(address, address), secure=False)


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
        raise ValueError(f"target {address!r} is not understood: {_FORMS}")
    return text
