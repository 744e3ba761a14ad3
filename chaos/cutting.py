"""Loopback proxy that cuts each connection after a random number of bytes, in the middle of whatever is sent."""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
from random import SystemRandom
from types import TracebackType
from typing import Self

_BUFFER = 1 << 16
_LEAST_BYTES = 1 << 4
_WAIT_SECONDS = 10.0
_RESET = struct.pack("ii", 1, 0)  # lingers for no time: a close resets the connection
_random = SystemRandom()


class CuttingProxy:
    """Forwards connections to one address for as long as the ``with`` block lasts, in a thread of its own.

    Each connection may carry a random number of bytes, both directions together, from 16 up, whose logarithm is evenly
    distributed. Then it is cut: half of the connections with a reset, the others with an end.

    Args:
        address: ``HOST:PORT`` to forward connections to.
        most_bytes: Most bytes of a connection.

    Attributes:
        address: ``HOST:PORT`` on which the proxy listens.
        cuts: Connections that were cut.
    """

    def __init__(self, address: str, most_bytes: int) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self._most_bytes = most_bytes
        self._cutting = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def stop_cutting(self) -> None:
        """Forward everything from now on."""
        self._cutting = False

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._forward, sock=self._listener)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(_WAIT_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_WAIT_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_WAIT_SECONDS)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        connection = _Connection(self._most_bytes)
        pumps = [
            asyncio.create_task(self._pump(connection, *ends)) for ends in ((reader, far_writer), (far_reader, writer))
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # by ``_close``
            return
        finally:
            self.cuts += connection.left == 0
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, far_writer):
                if connection.left == 0 and connection.reset:
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.close()

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_BUFFER):
                if self._cutting:
                    data = data[: connection.left]
                    connection.left -= len(data)
                writer.write(data)
                await writer.drain()
                if connection.left == 0:
                    return
        except OSError:
            return


class _Connection:
    """The bytes that a connection may still carry, and whether it ends with a reset."""

    def __init__(self, most_bytes: int) -> None:
        self.left = round(math.exp(_random.uniform(math.log(_LEAST_BYTES), math.log(most_bytes))))
        self.reset = _random.random() < 0.5
