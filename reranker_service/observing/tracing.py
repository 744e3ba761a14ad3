"""OpenTelemetry spans, one for each call: where they go is said by the standard OTEL_* variables.

Nothing of OpenTelemetry is imported before ``start_tracing``. Spans come from the interceptor for ``grpc.aio`` of
``opentelemetry-instrumentation-grpc``; a call that carries a ``traceparent`` joins its caller's trace.
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
    """Tracing was asked for and cannot be done."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Tracing that is under way.

    Attributes:
        interceptor: To be given to ``grpc.aio.server``.
    """

    interceptor: aio.ServerInterceptor
    _provider: TracerProvider

    def close(self) -> None:
        """Send what is left; blocks, at most for the exporter's own timeout."""
        self._provider.shutdown()


def start_tracing(service: str) -> Tracing:
    """Begin to trace.

    Read are OTEL_TRACES_EXPORTER (default: otlp; several with commas between; none), OTEL_EXPORTER_OTLP_*,
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_PROPAGATORS and OTEL_BSP_*.

    Args:
        service: Full name of the gRPC service whose calls are traced; health checks and reflection are not.

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
            raise TracingError(f"OTEL_TRACES_EXPORTER asks for {name!r}, and no such exporter is installed")
        provider.add_span_processor(BatchSpanProcessor(found[0].load()()))

    def ours(details: HandlerCallDetails) -> bool:
        return details.method.startswith(f"/{service}/")

    return Tracing(aio_server_interceptor(tracer_provider=provider, filter_=ours), provider)


def _exporters() -> list[str]:
    """Names of exporters as their packages register them."""
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    )
    if protocol not in _PROTOCOLS:
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; it can be {' or '.join(_PROTOCOLS)}")
    names = [name.strip() for name in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    return [_PROTOCOLS[protocol] if name == "otlp" else name for name in names if name != "none"]
