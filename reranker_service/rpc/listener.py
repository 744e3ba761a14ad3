"""Listener: gRPC servers on one address, one after the other, that look like one server to clients.

Some versions of grpcio (1.85.1; 1.78.0 does not) stop a whole server when a client sends a path that is not UTF-8: the
task that accepts calls ends with UnicodeDecodeError, and the port is closed. Calls in flight go on. The listener then
puts another server on the same port: clients are told to reconnect (GOAWAY), and no call in flight is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from grpc import aio

_SERVING_TASK = "_server_main_loop"
_REBIND_SECONDS = 10.0
_RETRY_SECONDS = 0.02
# Calls that are not waited for get this long to read the status of their last message.
_LINGER_SECONDS = 0.25

log = structlog.get_logger()


class ListenError(RuntimeError):
    """The address cannot be listened on."""


class Listener:
    """The server of one address.

    Args:
        make: Makes a gRPC server with all its handlers.
        bind: Binds it to a port, 0 for a free one, and returns the port. Raises ``RuntimeError``.
    """

    def __init__(self, make: Callable[[], aio.Server], bind: Callable[[aio.Server, int], int]) -> None:
        self._make = make
        self._bind = bind
        self._port = 0
        self._servers: list[aio.Server] = []
        self._retiring: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[Any] | None = None

    async def start(self, port: int) -> int:
        """Listen; returns the port. Raises ``ListenError``."""
        server = self._make()
        try:
            self._port = self._bind(server, port)
        except RuntimeError as error:
            raise ListenError(str(error)) from error
        before = asyncio.all_tasks()
        await server.start()
        self._servers.append(server)
        named = [task for task in asyncio.all_tasks() - before if _name(task) == _SERVING_TASK]
        self._serving = named[0] if named else None
        return self._port

    async def watch(self) -> Exception:
        """Keep the address served; returns the reason when that is no longer possible."""
        while True:
            if self._serving is not None:
                await asyncio.wait({self._serving})
                error = None if self._serving.cancelled() else self._serving.exception()
            else:
                # A grpcio whose task has another name. gRPC tells the end only once all calls are over.
                error = await _end(self._servers[-1])
            if not isinstance(error, UnicodeDecodeError):
                return ListenError(f"the serving task ended: {error!r}")
            log.warning("a client sent a path that is not UTF-8: listening anew", port=self._port)
            self._retire(self._servers[-1])
            try:
                await self._restart()
            except ListenError as refusal:
                return refusal

    async def stop(self, grace: float, idle: Coroutine[Any, Any, None] | None = None) -> None:
        """Refuse new calls, and end.

        Args:
            grace: Seconds that the calls in flight may take to finish.
            idle: Ends when no call is left that is worth waiting for; ``None`` waits for all calls.
        """
        stopping = asyncio.gather(*(server.stop(grace) for server in self._servers), return_exceptions=True)
        if idle is not None:
            waiting = asyncio.create_task(idle)
            both: list[asyncio.Future[Any]] = [stopping, waiting]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not stopping.done():
                await asyncio.gather(
                    *(server.stop(min(grace, _LINGER_SECONDS)) for server in self._servers), return_exceptions=True
                )
        await stopping

    async def _restart(self) -> None:
        deadline = time.monotonic() + _REBIND_SECONDS
        while True:
            try:
                await self.start(self._port)
                return
            except ListenError:
                # gRPC closes the old socket a moment after the task has ended.
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)

    def _retire(self, server: aio.Server) -> None:
        """Free a server that no longer listens once its last call is over."""

        async def free() -> None:
            await _end(server)
            await server.stop(None)
            self._servers.remove(server)

        task = asyncio.create_task(free())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


def _name(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__name__", "")


async def _end(server: aio.Server) -> Exception | None:
    """Wait until a server has ended by itself, and return the reason if gRPC gives one."""
    with contextlib.suppress(asyncio.TimeoutError):
        try:
            # With a time limit gRPC shields its own future, which a cancellation would break.
            while await server.wait_for_termination(timeout=3600):
                pass
        except Exception as error:
            return error
    return None
