"""Traces: the spans that an OpenTelemetry collector receives over a real socket; streams still stream."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.observing.tracing import TracingError, start_tracing

from . import forked
from .servers import ServerProcess

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
OPEN = pb.RerankStreamRequest(open=pb.StreamOpen())


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.grpc", None)
    with pytest.raises(TracingError, match=r"reranker-grpc\[tracing\]"):
        start_tracing("a.Service")


def test_a_server_without_the_package_says_so_and_ends(
    cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module that cannot be imported hides the real one, if it is installed.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.instrumentation'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with ServerProcess(
        "--model", str(cross_encoder), "--engine", "torch", "--tracing", ready=False, fresh=True
    ) as server:
        line = server.line("cannot start metrics or tracing")
        assert server.wait() == 1
    assert "--tracing" in line
    assert "pip install 'reranker-grpc[tracing]'" in line


class Collector:
    """An OpenTelemetry collector that keeps spans, so that a test can wait for them."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services

        self.spans: list = []
        self.services: set[str] = set()
        self._changed = threading.Condition()
        outer = self

        class Service(services.TraceServiceServicer):
            def Export(self, request: object, context: object) -> object:
                with outer._changed:
                    for resource in request.resource_spans:
                        named = {one.key: one.value.string_value for one in resource.resource.attributes}
                        outer.services.add(named["service.name"])
                        for scope in resource.scope_spans:
                            outer.spans.extend(scope.spans)
                    outer._changed.notify_all()
                return messages.ExportTraceServiceResponse()

        self._server = grpc.server(ThreadPoolExecutor(2))
        services.add_TraceServiceServicer_to_server(Service(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def wait_for(self, wanted: Callable[[object], bool]) -> object:
        """The first span for which ``wanted`` is true."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.spans)), 60), self.spans
            return next(filter(wanted, self.spans))

    def close(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.instrumentation.grpc")
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def server(cross_encoder: Path, collector: Collector) -> Iterator[ServerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.address}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with ServerProcess("--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--tracing") as server:
            yield server


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[rpc.RerankerServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield rpc.RerankerServiceStub(channel)


def attributes(span: object) -> dict[str, object]:
    values = {one.key: one.value for one in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_a_call_is_a_span_of_its_callers_trace(stub: rpc.RerankerServiceStub, collector: Collector) -> None:
    request = pb.RerankRequest(query="a query", documents=["a document"])
    stub.Rerank(request, metadata=[("traceparent", f"00-{TRACE}-{PARENT}-01")])
    span = collector.wait_for(lambda span: span.trace_id.hex() == TRACE)
    assert span.parent_span_id.hex() == PARENT
    assert span.name.strip("/") == "reranker.v1.RerankerService/Rerank"
    assert attributes(span)["rpc.grpc.status_code"] == 0
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert collector.services == {"reranker-service"}


def test_a_refused_call_has_its_status(stub: rpc.RerankerServiceStub, collector: Collector) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Rerank(pb.RerankRequest(query="a query"))
    # The interceptor does not change the status details.
    assert "documents" in caught.value.details()
    assert any(key == "grpc-status-details-bin" for key, _ in caught.value.trailing_metadata())
    collector.wait_for(lambda span: attributes(span).get("rpc.grpc.status_code") == 3)


def test_a_stream_still_streams_and_is_one_span(stub: rpc.RerankerServiceStub, collector: Collector) -> None:
    """Each reply arrives before the next message is sent; the span is exported after the end of the stream."""
    outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
    trace = "1" * 32
    call = stub.RerankStream(
        iter(outgoing.get, None), timeout=60, metadata=[("traceparent", f"00-{trace}-{PARENT}-01")]
    )
    outgoing.put(OPEN)
    assert next(call).HasField("opened")
    for number in range(3):
        outgoing.put(pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[f"query {number}", f"document {number}"])))
        pairs = pb.PairList(query_ids=[2 * number], document_ids=[2 * number + 1])
        outgoing.put(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, list=pairs)))
        assert next(call).result.id == number
    assert not any(span.trace_id.hex() == trace for span in collector.spans)
    outgoing.put(None)
    assert list(call) == []
    span = collector.wait_for(lambda span: span.trace_id.hex() == trace)
    assert attributes(span)["rpc.method"] == "RerankStream"
    assert attributes(span)["rpc.grpc.status_code"] == 0


def test_cancelled_streams_end_their_spans_quietly(
    stub: rpc.RerankerServiceStub, collector: Collector, server: ServerProcess
) -> None:
    traces = {f"2{number:031x}" for number in range(100)}  # some are cancelled during a write, some during a read
    for trace in traces:
        outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
        call = stub.RerankStream(iter(outgoing.get, None), metadata=[("traceparent", f"00-{trace}-{PARENT}-01")])
        outgoing.put(OPEN)
        assert next(call).HasField("opened")
        call.cancel()
        outgoing.put(None)
    for trace in traces:
        span = collector.wait_for(lambda span, trace=trace: span.trace_id.hex() == trace)
        assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert not [line for line in server.lines if "Traceback" in line or "detach" in line]


def test_probes_leave_no_spans(server: ServerProcess, stub: rpc.RerankerServiceStub, collector: Collector) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(server.address) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    stub.GetModelInfo(pb.GetModelInfoRequest())
    collector.wait_for(lambda span: attributes(span)["rpc.method"] == "GetModelInfo")
    assert {attributes(span)["rpc.service"] for span in collector.spans} == {"reranker.v1.RerankerService"}


def test_the_last_spans_are_exported_at_shutdown(
    cross_encoder: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.address}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "another-name")
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--tracing", "--metrics-port", "0"]
    with ServerProcess(*flags) as server:
        with grpc.insecure_channel(server.address) as channel:
            rpc.RerankerServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
        assert "another-name" not in collector.services
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "another-name" in collector.services


@pytest.mark.parametrize(
    ("variable", "value"), [("OTEL_TRACES_EXPORTER", "carrier-pigeon"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke")]
)
def test_an_unknown_exporter_or_protocol_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.instrumentation.grpc")
    monkeypatch.setenv(variable, value)
    with pytest.raises(TracingError, match=rf"{variable}.*{value}"):
        start_tracing("a.Service")


def test_spans_can_be_printed() -> None:
    pytest.importorskip("opentelemetry.instrumentation.grpc")
    program = (
        "from reranker_service.observing.tracing import start_tracing\n"
        "tracing = start_tracing('a.Service')\n"
        "with tracing._provider.get_tracer('test').start_as_current_span('hello'): pass\n"
        "tracing.close()\n"
    )
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console"}
    result = forked.run([sys.executable, "-c", program], env=environment, timeout=240)
    result.check_returncode()
    assert '"name": "hello"' in result.stdout
