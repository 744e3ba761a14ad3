"""Tracing: one OpenTelemetry span for each call, exported as the standard OTEL_* variables say.

``start_tracing`` imports OpenTelemetry; importing this file does not. Spans come from the ``grpc.aio`` interceptor of
``opentelemetry-instrumentation-grpc``. A call that carries a ``traceparent`` joins its caller's trace.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from grpc import HandlerCallDetails, aio

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME = "reranker-service"
_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class TracingError(RuntimeError):
    """Tracing cannot start: a package or an exporter is missing."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Running tracing.

    Attributes:
        interceptor: Interceptor for ``grpc.aio.server``.
    """

    interceptor: aio.ServerInterceptor
    _provider: TracerProvider

    def close(self) -> None:
        """Export the remaining spans; blocks at most for the exporter's own timeout."""
        self._provider.shutdown()


def start_tracing(service: str) -> Tracing:
    """Start tracing.

    It reads OTEL_TRACES_EXPORTER (default: otlp; several with commas between; none), OTEL_EXPORTER_OTLP_*,
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_PROPAGATORS and OTEL_BSP_*.

    Args:
        service: Full name of the gRPC service to trace; health checks and reflection are not traced.

    Raises:
        TracingError: A package is missing, or a variable names an exporter that is not installed.
    """
    try:
        from opentelemetry.instrumentation.grpc import aio_server_interceptor
        from opentelemetry.sdk import resources
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(
            f"tracing needs packages that are not installed ({error}): pip install 'reranker-grpc[tracing]'"
        ) from error

    resource = resources.Resource.create()
    if str(resource.attributes.get(resources.SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(resources.Resource({resources.SERVICE_NAME: SERVICE_NAME}))
    provider = TracerProvider(resource=resource)
    for name in _exporters():
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise TracingError(f"OTEL_TRACES_EXPORTER names {name!r}, but no exporter of this name is installed")
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))

    def ours(details: HandlerCallDetails) -> bool:
        return details.method.startswith(f"/{service}/")

    return Tracing(aio_server_interceptor(tracer_provider=provider, filter_=ours), provider)


def _exporters() -> list[str]:
    """Names of the exporters, as their packages register them."""
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    )
    if protocol not in _PROTOCOLS:
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; it can be {' or '.join(_PROTOCOLS)}")
    names = [name.strip() for name in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    return [_PROTOCOLS[protocol] if name == "otlp" else name for name in names if name != "none"]
