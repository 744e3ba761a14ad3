"""Loopback proxy that counts the bytes of both directions above TCP."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

_BUFFER = 1 << 18


class CountingProxy:
    """Forwards connections to one address for as long as the ``with`` block lasts, and counts their bytes.

    Args:
        address: ``HOST:PORT`` to forward connections to.
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
        """``HOST:PORT`` on which the proxy listens."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    @property
    def bytes(self) -> int:
        """Bytes forwarded so far, both directions together."""
        with self._lock:
            return self._bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # shutdown wakes the threads that wait in accept or recv; close alone does not.
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
