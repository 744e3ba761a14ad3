"""Observers: metrics and tracing of one server, started before the server and ended after it.

Only the packages of the observers that the settings ask for are imported.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import structlog
from grpc import aio

from .metrics import Metrics

log = structlog.get_logger()


class ObserverError(RuntimeError):
    """Metrics or tracing cannot start; the message names the flag."""


@dataclass(frozen=True, slots=True)
class Observers:
    """Running observers.

    Attributes:
        metrics: Receives the server's events.
        interceptors: Interceptors for ``grpc.aio.server``.
    """

    metrics: Metrics
    interceptors: tuple[aio.ServerInterceptor, ...] = ()


@contextmanager
def observers(
    service: str,
    rpcs: Sequence[str],
    scoring_rpcs: Sequence[str],
    *,
    host: str,
    metrics_port: int | None,
    metrics_tls: Callable[[], ssl.SSLContext] | None = None,
    metrics_token: Callable[[str], str | None] | None = None,
    tracing: bool,
) -> Iterator[Observers]:
    """Run the observers of a server.

    Args:
        service: Full name of the gRPC service to trace.
        rpcs: Names of all its RPCs.
        scoring_rpcs: Names of the RPCs that score pairs.
        host: Address to listen on for Prometheus.
        metrics_port: Port for Prometheus; 0 picks a free one, ``None`` means no metrics.
        metrics_tls: See ``MetricsServer``.
        metrics_token: See ``MetricsServer``.
        tracing: Whether to trace.

    Raises:
        ObserverError: The port cannot be listened on, or tracing lacks a package or is configured wrongly.
    """
    with ExitStack() as stack:
        metrics = Metrics()
        interceptors: tuple[aio.ServerInterceptor, ...] = ()
        if tracing:
            from .tracing import TracingError, start_tracing

            try:
                running = start_tracing(service)
            except TracingError as error:
                raise ObserverError(f"--tracing: {error}") from error
            stack.callback(running.close)
            interceptors = (running.interceptor,)
        if metrics_port is not None:
            from .metrics_server import MetricsServer
            from .prometheus import PrometheusMetrics

            metrics = PrometheusMetrics(rpcs, scoring_rpcs)
            try:
                server = MetricsServer(metrics, host, metrics_port, metrics_tls, metrics_token)
            except OSError as error:
                raise ObserverError(f"--metrics-port {metrics_port}: cannot listen on {host}: {error}") from error
            stack.callback(server.close)
            log.info("metrics", metrics=server.address)
        yield Observers(metrics, interceptors)
