"""Who watches the server: metrics and tracing, begun before anything else and ended after it.

What is not asked for is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import structlog
from grpc import aio

from ..settings import Settings
from .metrics import Metrics

log = structlog.get_logger()


class ObserverError(RuntimeError):
    """Metrics or tracing were asked for and cannot be had."""


@dataclass(frozen=True, slots=True)
class Observers:
    """Those who watch.

    Attributes:
        metrics: To be told of the server's work.
        interceptors: For ``grpc.aio.server``.
    """

    metrics: Metrics
    interceptors: tuple[aio.ServerInterceptor, ...] = ()


@contextmanager
def observers(settings: Settings, service: str) -> Iterator[Observers]:
    """Have the server watched as the settings say.

    Args:
        settings: ``host``, ``metrics_port`` and ``tracing`` matter.
        service: Full name of the gRPC service whose calls are traced.

    Raises:
        ObserverError: The port cannot be listened on, or tracing lacks a package or is configured wrongly.
    """
    with ExitStack() as stack:
        metrics = Metrics()
        interceptors: tuple[aio.ServerInterceptor, ...] = ()
        if settings.tracing:
            from .tracing import TracingError, start_tracing

            try:
                tracing = start_tracing(service)
            except TracingError as error:
                raise ObserverError(f"--tracing: {error}") from error
            stack.callback(tracing.close)
            interceptors = (tracing.interceptor,)
        if settings.metrics_port is not None:
            from .prometheus import MetricsServer, PrometheusMetrics

            metrics = PrometheusMetrics()
            try:
                server = MetricsServer(metrics, settings.host, settings.metrics_port)
            except OSError as error:
                raise ObserverError(
                    f"--metrics-port {settings.metrics_port}: cannot listen on {settings.host}: {error}"
                ) from error
            stack.callback(server.close)
            log.info("metrics", metrics=server.address)
        yield Observers(metrics, interceptors)
