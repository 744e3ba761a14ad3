"""Names: host names among a client's addresses, resolved by the client into one endpoint for each IP address.

A healthy gRPC channel does not resolve its name again, and one channel puts a stream on one of its addresses. With one
endpoint for each IP address, a job uses all servers behind a name, and servers that are added or removed are followed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence

from loss_client.client.addresses import Address
from loss_client.client.endpoints import ChannelSettings, Endpoint

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the IP addresses of a host name; the second argument is the port."""

LOOK_SECONDS = 1.0
"""Seconds between two looks at the addresses of the names, while jobs or calls run."""
_RESOLVE_SECONDS = 5.0
# gRPC sends calls through the proxy that these name, and a proxy may reach a name but not its addresses.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """Resolve a host name by the system's resolver. Raises ``OSError``."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class Names:
    """The endpoints of a client, kept up to date with the addresses of its host names.

    Literal IP addresses, ``localhost`` and addresses outside of the domain name system have one endpoint for good. So
    has a name without an IP address, until it has one, and every name where a proxy is set.

    Args:
        settings: The addresses.
        resolve: Resolves the names. Default: the system's resolver.
        environment: Variables that may name a proxy.

    Attributes:
        endpoints: All endpoints in use, in the order of the addresses; changed in place.
    """

    def __init__(
        self, settings: ChannelSettings, resolve: Resolve | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        proxied = resolve is None and any(environment.get(name) for name in _PROXY_VARIABLES)
        self._settings = settings
        self._resolve = resolve
        self._names = {
            address: name for address in settings.addresses if not proxied and (name := address.name) is not None
        }
        self._found: dict[Address, dict[str, Endpoint]] = {
            address: {} if address in self._names else {"": Endpoint(address, settings)}
            for address in settings.addresses
        }
        self._leaving: list[Endpoint] = []
        self._due = 0.0  # loop time of the next look
        self._looking: asyncio.Task[None] | None = None
        self.endpoints: list[Endpoint] = []
        self._list()

    @property
    def any(self) -> bool:
        """Whether there are names, so that endpoints may come and go."""
        return bool(self._names)

    async def ready(self) -> None:
        """Wait until each name has been resolved once; later, begin to resolve the names again if that is due."""
        self.look()
        if not all(self._found.values()):
            assert self._looking is not None  # some names have never been resolved
            await asyncio.wait({self._looking})

    def look(self) -> None:
        """Begin to resolve the names if that is due, without waiting for the result."""
        now = asyncio.get_running_loop().time()
        if self._names and now >= self._due and (self._looking is None or self._looking.done()):
            self._due = now + LOOK_SECONDS
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def close(self) -> None:
        """Close the channels of all endpoints."""
        for endpoint in (*self.endpoints, *self._leaving):
            await endpoint.close()

    async def _look(self) -> None:
        found = await asyncio.gather(*(self._ips(host, port) for host, port in self._names.values()))
        for address, ips in zip(self._names, found, strict=True):
            known = self._found[address]
            if not ips:  # what was known stays in use: the name server may be away for a while
                if not known:
                    known[""] = Endpoint(address, self._settings)  # gRPC's error then says what is wrong with the name
                continue
            for ip in set(known) - set(ips):
                self._leave(known.pop(ip))
            for ip in ips:
                if ip not in known:
                    known[ip] = Endpoint(address.at(ip), self._settings)
        self._list()
        for endpoint in [one for one in self._leaving if not one.attempts]:
            self._leaving.remove(endpoint)
            await endpoint.close()

    async def _ips(self, host: str, port: int) -> list[str]:
        """Resolve a name; returns its IP addresses in an order that is the same for all ranks, none after an error."""
        try:
            async with asyncio.timeout(_RESOLVE_SECONDS):
                return sorted(await (self._resolve or resolve_host)(host, port))
        except (OSError, UnicodeError, TimeoutError):
            return []

    def _leave(self, endpoint: Endpoint) -> None:
        """Take an endpoint out of use; what it has in flight is finished."""
        endpoint.leaving = True
        self._leaving.append(endpoint)

    def _list(self) -> None:
        self.endpoints[:] = [endpoint for found in self._found.values() for endpoint in found.values()]
