"""HTTP server of the metrics page, with the TLS and the tokens of the gRPC port."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import structlog
from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from .prometheus import PrometheusMetrics

_CONNECTION_SECONDS = 10.0

log = structlog.get_logger()


class MetricsServer:
    """Serves the metrics under any path, from threads of its own.

    Attributes:
        address: Its address, ``host:port``.
    """

    def __init__(
        self,
        metrics: PrometheusMetrics,
        host: str,
        port: int,
        tls: Callable[[], ssl.SSLContext] | None = None,
        find_token: Callable[[str], str | None] | None = None,
    ) -> None:
        """Listen.

        Args:
            metrics: The metrics.
            host: Address to listen on.
            port: Port to listen on; 0 picks a free port.
            tls: Returns the TLS context of a new connection; ``None`` for plaintext.
            find_token: Returns ``None`` for a token that is not in force; ``None`` if requests need no token.

        Raises:
            OSError: The port cannot be used.
        """
        page: WSGIApplication = make_wsgi_app(metrics.registry)
        self._server = _server_class(host, tls)((host, port), _Handler)
        self._server.set_app(page if find_token is None else _with_tokens(page, find_token))
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        self.address = f"[{host}]:{self._server.server_port}" if ":" in host else f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening; takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def _server_class(host: str, tls: Callable[[], ssl.SSLContext] | None) -> type[ThreadingWSGIServer]:
    class Server(ThreadingWSGIServer):
        address_family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]

        def finish_request(self, request: Any, client_address: Any) -> None:
            """Answer a connection, on its own thread: a client that fails to shake hands holds up no other one."""
            if tls is None:
                super().finish_request(request, client_address)
                return
            request.settimeout(_CONNECTION_SECONDS)
            with tls().wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Log an error of one connection, such as a failed handshake."""
            log.debug("metrics connection failed", peer=str(client_address), exc_info=True)

    return Server


def _with_tokens(page: WSGIApplication, find: Callable[[str], str | None]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "bearer" and find(token.strip()) is not None:
            return page(environ, start_response)
        headers = [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain; charset=utf-8")]
        start_response("401 Unauthorized", headers)
        return [b"this page needs one of the server's tokens: send 'Authorization: Bearer TOKEN'\n"]

    return answer
