"""A loopback proxy that counts the bytes of both directions, as they stand on the wire above TCP."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

_BUFFER = 1 << 18


class CountingProxy:
    """Passes connections on to one address while it is open; ``bytes`` is what it has passed on.

    Args:
        address: ``HOST:PORT`` to pass connections on to.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._bytes = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """``HOST:PORT`` where it listens."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    @property
    def bytes(self) -> int:
        """Bytes passed on so far, both directions together."""
        with self._lock:
            return self._bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Wakes the threads that wait for them.
        for connection in (self._listener, *self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                connection.close()
                continue
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for connection in (near, far):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(_BUFFER):
                sink.sendall(data)
                with self._lock:
                    self._bytes += len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()
