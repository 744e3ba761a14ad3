"""The server's edge: hostile frames, compressed and large messages, calls beyond the limit, errors, wrong settings."""

from __future__ import annotations

import asyncio
import gc
import queue
import re
import signal
import string
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from pydantic import ValidationError

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.loading import check_flags, choose_model, load
from reranker_service.models import UnsupportedModelError
from reranker_service.rpc.errors import InvalidRequestError, RerankError, Violation, as_rerank_error
from reranker_service.rpc.limits import Limits
from reranker_service.rpc.listener import Listener
from reranker_service.rpc.validation import Validator
from reranker_service.rpc.wire import TooMany, find_excess
from reranker_service.scoring import ScoringError
from reranker_service.scoring.costs import Costs, TableCosts
from reranker_service.settings import Settings, variable_errors

from . import http2
from .holding import RELEASE
from .scrapes import scrape
from .servers import ControlledEngine, ServerProcess, serve_in_process, violations
from .test_lifecycle import SERVING, check, flags, holding

MIB = 1 << 20
OPEN = pb.RerankStreamRequest(open=pb.StreamOpen())
RERANK = pb.RerankRequest(query="a query", documents=["a document"])
EMPTY_REQUESTS = b"\x0a\x00"


@pytest.fixture
def server(cross_encoder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(*flags(cross_encoder), "--max-concurrent-rpcs", "3") as running:
        yield running


def stub_of(channel: grpc.Channel) -> rpc.RerankerServiceStub:
    return rpc.RerankerServiceStub(channel)


def failure(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def idle_stream(channel: grpc.Channel) -> tuple[grpc.Call, Callable[[], None]]:
    """An opened stream, and the function that half-closes it."""
    outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
    outgoing.put(OPEN)
    call = stub_of(channel).RerankStream(iter(outgoing.get, None))
    assert next(call).HasField("opened")
    return call, lambda: outgoing.put(None)


def rerank_again(channel: grpc.Channel) -> pb.RerankResponse:
    """Rerank; once more if gRPC dropped the call, because it came over a connection that was about to close."""
    try:
        return stub_of(channel).Rerank(RERANK, timeout=10, wait_for_ready=True)
    except grpc.RpcError as error:
        if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
            raise
        return stub_of(channel).Rerank(RERANK, timeout=10, wait_for_ready=True)


def test_a_path_that_is_not_utf8_costs_no_call_in_flight(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stream, close = idle_stream(channel)
        for number in range(1, 4):
            with http2.connect(server.address) as connection:
                connection.sendall(http2.call_headers(1, b"/\xff\xfe/x", end_stream=True))
                while sum("listening anew" in line for line in server.lines) < number:
                    server.wait_for("listening anew", after=len(server.lines), seconds=10)
            assert len(rerank_again(channel).results) == 1
        assert check(server.address) == SERVING
        close()
        assert list(stream) == []
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_health_watcher_that_takes_no_data_holds_up_neither_others_nor_the_end(server: ServerProcess) -> None:
    with http2.connect(server.address) as connection, grpc.insecure_channel(server.address) as channel:
        no_window = (4).to_bytes(2, "big") + (0).to_bytes(4, "big")  # SETTINGS_INITIAL_WINDOW_SIZE
        watch = http2.call_headers(1, b"/grpc.health.v1.Health/Watch") + http2.message(1, b"")
        connection.sendall(http2.frame(4, 0, 0, no_window) + watch)
        replies = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(replies).status == SERVING
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert next(replies).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.wait() == 0
    assert time.monotonic() - began < 15


def test_a_serving_task_that_ends_otherwise_is_reported() -> None:
    async def scenario() -> Exception:
        listener = Listener(aio.server, lambda server, port: server.add_insecure_port(f"127.0.0.1:{port}"))
        await listener.start(0)
        assert listener._serving is not None, "grpcio's serving task has another name"
        listener._serving.cancel()
        reason = await listener.watch()
        await listener.stop(0)
        return reason

    assert "serving task ended" in str(asyncio.run(scenario()))


def test_a_server_that_cannot_listen_any_more_says_so_and_exits_with_1(cross_encoder: Path) -> None:
    with ServerProcess(*flags(cross_encoder), module="tests.unbindable") as server:
        with http2.connect(server.address) as connection:
            connection.sendall(http2.call_headers(1, b"/\xff\xfe/x", end_stream=True))
            server.line("cannot go on listening")
        assert server.wait() == 1


def memory(server: ServerProcess) -> float:
    """Resident MiB."""
    return psutil.Process(server.pid).memory_info().rss / MIB


def test_messages_that_grow_are_refused_before_they_do(server: ServerProcess) -> None:
    """Growth of a real server's memory stays under 200 MiB, and health answers meanwhile."""
    with grpc.insecure_channel(server.address) as warm:
        stub_of(warm).Rerank(RERANK)
    bomb = EMPTY_REQUESTS * (30 * MIB)
    largest = EMPTY_REQUESTS * (4 * MIB - 8)
    before, peak, done = memory(server), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory(server))

    watcher = threading.Thread(target=watch)
    watcher.start()
    unlimited = [("grpc.max_send_message_length", -1)]
    try:
        for payload, compression, code, times in (
            (bomb, grpc.Compression.Gzip, grpc.StatusCode.UNIMPLEMENTED, 3),
            (bomb, grpc.Compression.NoCompression, grpc.StatusCode.RESOURCE_EXHAUSTED, 3),
            (largest, grpc.Compression.NoCompression, grpc.StatusCode.INVALID_ARGUMENT, 3),
        ):
            with grpc.insecure_channel(server.address, unlimited) as channel:
                call = channel.unary_unary("/reranker.v1.RerankerService/RerankBatch")
                calls = [call.future(payload, compression=compression, timeout=60) for _ in range(times)]
                began = time.monotonic()
                assert check(server.address) == SERVING
                assert time.monotonic() - began < 5
                assert [one.code() for one in calls] == [code] * times
        assert violations(calls[0].exception()) == {
            "requests": "there are more than 1024, the limit of one RerankBatchRequest"
        }
    finally:
        done.set()
        watcher.join()
    assert peak - before < 200


def test_compressed_messages_are_read_with_the_flag_and_never_grow_beyond_the_limit(cross_encoder: Path) -> None:
    with ServerProcess(*flags(cross_encoder), "--accept-compressed") as server:
        with grpc.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel:
            documents = ["a document " * 100] * 20
            request = pb.RerankRequest(query="a query", documents=documents)
            assert len(stub_of(channel).Rerank(request, timeout=30).results) == 20
            payload = EMPTY_REQUESTS * (30 * MIB)
            before = memory(server)
            call = channel.unary_unary("/reranker.v1.RerankerService/RerankBatch")
            error = failure(lambda: call(payload, timeout=30))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert memory(server) - before < 100


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def nested(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + varint(len(body)) + body


def test_fields_are_counted_as_the_parser_counts_them() -> None:
    batch = pb.RerankBatchRequest(
        requests=[
            pb.RerankRequest(
                query="q", documents=["x" * 200] * number, top_n=300, options=pb.RerankOptions(max_length=9)
            )
            for number in range(50)
        ]
    )
    data = batch.SerializeToString() + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\xfa\x01\x02ab" + b"\xf8\x01\x96\x01"
    assert len(pb.RerankBatchRequest.FromString(data).requests) == 50
    requests, documents = "reranker.v1.RerankBatchRequest.requests", "reranker.v1.RerankRequest.documents"
    total = sum(range(50))

    def excess(most: int, documents_most: int, other: int) -> TooMany | None:
        return find_excess(data, pb.RerankBatchRequest, {requests: most, documents: documents_most}, other)

    assert excess(50, total, 50) is None
    assert excess(49, total, 50) == TooMany(requests, 49)
    assert excess(50, total - 1, 50) == TooMany(documents, total - 1)
    assert excess(50, total, 49) == TooMany("sub-messages", 49)


@pytest.mark.parametrize(
    "data",
    [b"\x0a", b"\x0a\x05ab", b"\xff" * 2_000_000, b"\x0f", b"\x80", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"],
)
def test_bytes_that_are_no_message_are_left_to_the_parser(data: bytes) -> None:
    began = time.monotonic()
    assert find_excess(data, pb.RerankBatchRequest, {}, 5) is None
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("method", "data", "field"),
    [
        ("Rerank", b"\x12\x00" * MIB, "documents"),
        ("RerankBatch", nested(0x0A, b"\x12\x00" * MIB), "documents"),
        ("Rerank", b"\x2a\x00" * MIB, "sub-messages"),
        ("GetModelInfo", b"", ""),
    ],
)
def test_what_grows_is_refused_in_unary_calls(
    stub: object, cross_encoder_server: ServerProcess, method: str, data: bytes, field: str
) -> None:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        call = channel.unary_unary(f"/reranker.v1.RerankerService/{method}")
        if not field:
            assert pb.GetModelInfoResponse.FromString(call(data)).limits.max_message_bytes == 8 * MIB
            return
        error = failure(lambda: call(data, timeout=30))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert list(violations(error)) == [field]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (nested(0x12, b"\x0a\x00" * MIB), "texts"),
        (b"\x0a\x00\x12\x00" * (MIB // 2), "sub-messages"),
        (nested(0x1A, b"\x12\x00\x1a\x00" * (MIB // 2)), "sub-messages"),
    ],
)
def test_what_grows_is_refused_in_streams(cross_encoder_server: ServerProcess, data: bytes, field: str) -> None:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        call = channel.stream_stream("/reranker.v1.RerankerService/RerankStream")
        error = failure(lambda: list(call(iter([OPEN.SerializeToString(), data]), timeout=30)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(error)) == [field]


def test_a_reply_with_documents_that_would_not_fit_is_refused_before_it_is_scored(
    stub: rpc.RerankerServiceStub,
) -> None:
    request = pb.RerankRequest(query="q", documents=["x" * 2040] * 4096, return_documents=True)
    assert request.ByteSize() < 8 * MIB < request.ByteSize() + 24 * 4096
    error = failure(lambda: stub.Rerank(request, timeout=60))
    assert "leave out return_documents" in violations(error)["return_documents"]
    batch = pb.RerankBatchRequest(requests=[request])
    error = failure(lambda: stub.RerankBatch(batch, timeout=60))
    assert "leave out return_documents" in violations(error)["requests"]


LARGE = ["x" * MIB] * 2
TOO_LONG = pb.RerankRequest(query="q" * (MIB + 1), documents=LARGE)
WRONG_CHUNK = pb.RerankStreamRequest(chunk=pb.StreamChunk(id=1, grid=pb.PairGrid(query_ids=[7], document_ids=[0])))
WRONG_TEXTS = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["q" * (MIB + 1)]))
GOOD_TEXTS = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=LARGE))


async def refused_call(stub: rpc.RerankerServiceStub) -> None:
    with pytest.raises(aio.AioRpcError):
        await stub.Rerank(TOO_LONG)


async def refused_item(stub: rpc.RerankerServiceStub) -> None:
    response = await stub.RerankBatch(pb.RerankBatchRequest(requests=[TOO_LONG]))
    assert response.items[0].HasField("error")


async def refused_chunk(stub: rpc.RerankerServiceStub) -> None:
    replies = [reply async for reply in stub.RerankStream(iter([OPEN, GOOD_TEXTS, WRONG_CHUNK]))]
    assert replies[1].result.HasField("error")


async def refused_stream(stub: rpc.RerankerServiceStub) -> None:
    with pytest.raises(aio.AioRpcError):
        async for _ in stub.RerankStream(iter([OPEN, GOOD_TEXTS, WRONG_TEXTS])):
            pass


@pytest.mark.parametrize("call", [refused_call, refused_item, refused_chunk, refused_stream])
def test_a_refused_request_is_freed_without_the_garbage_collector(cross_encoder: Path, call: Callable) -> None:
    """Nothing of the server's frames, which hold the request, is left for the collector."""

    async def scenario() -> list[str]:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            stub = rpc.RerankerServiceStub(channel)
            await stub.Rerank(RERANK)
            gc.collect()
            gc.disable()
            try:
                await call(stub)
                await stub.Rerank(RERANK)
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                return [
                    one.f_code.co_qualname
                    for one in gc.garbage
                    if type(one).__name__ == "frame"
                    and "reranker_service" in one.f_code.co_filename
                    and any(
                        isinstance(
                            value, (pb.RerankRequest, pb.RerankBatchRequest, pb.RerankStreamRequest, bytes, RerankError)
                        )
                        or type(value).__name__ in ("TextTable", "StreamSession", "_ServicerContext")
                        for value in one.f_locals.values()
                    )
                ]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()

    assert asyncio.run(scenario()) == []


def test_health_and_reflection_are_never_counted(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        streams = [idle_stream(channel) for _ in range(3)]
        error = failure(lambda: stub_of(channel).Rerank(RERANK, timeout=10))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-concurrent-rpcs" in error.details()
        status, retry = rpc_status.from_call(error), error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 1000
        further = failure(lambda: next(stub_of(channel).RerankStream(iter([OPEN]), timeout=10)))
        assert further.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert check(server.address) == SERVING
        assert stub_of(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=10).model
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=10)
        assert "reranker.v1.RerankerService" in {one.name for one in next(replies).list_services_response.service}
        stream, close = streams[0]
        close()
        assert list(stream) == []
        # The server counts a call until its status is sent, which its client may see a moment before.
        deadline = time.monotonic() + 10
        while True:
            try:
                assert len(stub_of(channel).Rerank(RERANK, timeout=10).results) == 1
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline
        for _, close in streams[1:]:
            close()


def test_half_sent_calls_count_and_refused_messages_are_not_read(cross_encoder: Path) -> None:
    with ServerProcess(*flags(cross_encoder), "--max-concurrent-rpcs", "1", "--metrics-port", "0") as server:
        error = None
        for seconds in (0.2, 0.5, 1, 2, 5):
            with http2.connect(server.address) as half, grpc.insecure_channel(server.address) as channel:
                half.sendall(http2.call_headers(1, b"/reranker.v1.RerankerService/Rerank"))
                time.sleep(seconds)  # if the server has not read the headers by then, the next call is the first one
                error = stub_of(channel).Rerank.future(RERANK, timeout=30).exception()
            if error is not None:
                break
        assert error is not None
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        counted = ("reranker_requests_total", "Rerank", "RESOURCE_EXHAUSTED")
        deadline = time.monotonic() + 20
        # The refusal is counted once gRPC has sent it, which the client may see before.
        while not any(
            name == counted[0] and set(counted[1:]) <= {text for _, text in labels}
            for name, labels in scrape(server).samples
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_signal_ends_a_server_whose_download_hangs() -> None:
    arguments = ["--model", "owner/model", "--engine", "torch"]
    with ServerProcess(*arguments, ready=False, module="tests.hanging") as server:
        server.line("event=downloading")
        server.signal(signal.SIGTERM)
        server.line("event=stopped")
        assert server.wait(20) == 0


def test_a_health_watcher_does_not_delay_the_end(cross_encoder: Path) -> None:
    with ServerProcess(*flags(cross_encoder), "--graceful-timeout", "60") as server:
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            began = time.monotonic()
            server.signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert server.wait(50) == 0
            assert time.monotonic() - began < 10


def test_a_scoring_call_is_waited_for_beside_a_health_watcher(cross_encoder: Path) -> None:
    with holding(cross_encoder, "--graceful-timeout", "60") as (server, call):
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            server.signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            time.sleep(0.5)
            assert not call.done()
            server.signal(RELEASE)
            assert len(call.result().results) == 1
            assert server.wait(50) == 0


def test_an_internal_error_tells_its_name_and_an_id(cross_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> tuple[aio.AioRpcError, str, str]:
        engine = ControlledEngine()
        engine.failure = ValueError("/home/someone/model: " + "x" * 5000)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Rerank(RERANK)
            batch = await stub.RerankBatch(pb.RerankBatchRequest(requests=[RERANK, RERANK]))
            return caught.value, *(item.error.message for item in batch.items)

    error, *messages = asyncio.run(scenario())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "/home" not in error.debug_error_string()
    number = re.fullmatch(
        r"scoring failed: ValueError; the server's log has the details under id (\w{8})", error.details()
    )[1]
    assert all(number in message for message in messages)
    printed = capsys.readouterr().out
    assert number in printed
    assert "/home/someone/model" in printed


@pytest.mark.parametrize("text", ["x" * 5000, "ü" * 5000, "%" * 5000, "\U0001f600" * 5000, "\udc80" * 5000])
def test_no_status_is_larger_than_headers_may_be(text: str) -> None:
    for error in (
        RerankError(text),
        InvalidRequestError([Violation("a field", text)]),
        as_rerank_error(ScoringError(text)),
    ):
        in_header = quote(error.message, safe=string.printable.replace("%", ""))
        assert len(error.metadata()[0][1]) * 4 / 3 + len(in_header) < 8192
        assert error.message.endswith("...")


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        (
            {"max_message_bytes": 65536},
            ["--limits.max-message-bytes", "--limits.max-pairs-per-chunk", "--limits.max-text-bytes"],
        ),
        ({"max_text_bytes": 9 * MIB}, ["--limits.max-text-bytes", "--limits.max-message-bytes"]),
        ({"max_text_bytes_per_stream": 1000}, ["--limits.max-text-bytes", "--limits.max-text-bytes-per-stream"]),
        ({"max_pairs_per_chunk": 1 << 22}, ["--limits.max-pairs-per-chunk", "--limits.max-message-bytes"]),
        ({"max_documents_per_request": 1 << 20}, ["--limits.max-documents-per-request", "--limits.max-message-bytes"]),
        ({"max_pairs_per_batch": 1 << 22}, ["--limits.max-pairs-per-batch", "--limits.max-message-bytes"]),
        ({"max_requests_per_batch": 1 << 20}, ["--limits.max-requests-per-batch", "--limits.max-message-bytes"]),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits: dict[str, int], names: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Limits(**limits)
    for name in names:
        assert f"{name} is" in str(caught.value)


def test_the_largest_chunk_that_the_limits_allow_gets_its_reply(cross_encoder: Path) -> None:
    async def scenario() -> int:
        limits = Limits(
            max_message_bytes=65536,
            max_pairs_per_chunk=10_700,
            max_text_bytes=1000,
            max_texts_per_stream=128,
            max_requests_per_batch=100,
            max_documents_per_request=4000,
            max_pairs_per_batch=4000,
        )
        engine = ControlledEngine(max_in_flight=1 << 15, max_batch=1 << 14)
        async with serve_in_process(cross_encoder, engine, limits) as channel:
            ids = [number % 128 for number in range(10_700)]
            messages = [
                OPEN,
                pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[f"t{number}" for number in range(128)])),
                pb.RerankStreamRequest(chunk=pb.StreamChunk(list=pb.PairList(query_ids=ids, document_ids=ids))),
            ]
            replies = [reply async for reply in rpc.RerankerServiceStub(channel).RerankStream(iter(messages))]
            return len(replies[1].result.scores.values)

    assert asyncio.run(scenario()) == 10_700


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RERANKER_CACHE_BYTE", "1", "the nearest is RERANKER_CACHE_BYTES"),
        ("RERANKER_LIMITS__MAX_TEXT_BYTEZ", "1", "the nearest is RERANKER_LIMITS__MAX_TEXT_BYTES"),
        ("RERANKER_PORT", "tcp://10.0.0.1:50051", "enableServiceLinks: false"),
        ("RERANKER_SERVICE_HOST", "10.0.0.1", "enableServiceLinks: false"),
        ("RERANKER_SERVICE_PORT_GRPC", "50051", "enableServiceLinks: false"),
        ("RERANKER_PORT_50051_TCP", "tcp://10.0.0.1:50051", "enableServiceLinks: false"),
        ("RERANKER_PORT_50051_TCP_ADDR", "10.0.0.1", "enableServiceLinks: false"),
        ("RERANKER_CPU_SERVICE_HOST", "10.0.0.1", "enableServiceLinks: false"),
    ],
)
def test_variables_that_set_nothing_are_errors(name: str, value: str, words: str) -> None:
    (message,) = variable_errors([(name, value), ("PATH", "/bin"), ("RERANKER_CLIENT_TOKEN", "x")])
    assert name in message
    assert words in message


def test_every_setting_may_be_a_variable() -> None:
    names = [f"RERANKER_{name.upper()}" for name in Settings.model_fields]
    names += [f"RERANKER_LIMITS__{name.upper()}" for name in Limits.model_fields]
    assert variable_errors((name, "1") for name in names) == []


@pytest.mark.parametrize(
    ("settings", "engine", "words"),
    [
        ({"device": "cpu"}, "vllm", "--device cpu is for the torch engine"),
        ({"threads": 3}, "vllm", "--threads 3"),
        ({"engine_args": {"max_model_len": 64}}, "torch", "--engine-args is for vLLM"),
    ],
)
def test_flags_that_the_engine_would_ignore_are_errors(settings: dict[str, object], engine: str, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        check_flags(Settings(**settings), engine)
    check_flags(Settings(**settings), "torch" if engine == "vllm" else "vllm")


@pytest.mark.parametrize(
    ("settings", "engine", "words"),
    [
        ({"engine": "torch", "engine_args": {"max_model_len": 64}}, "torch", "--engine-args is for vLLM"),
        ({"engine": "vllm", "device": "cuda:99"}, "vllm", "--device cuda:99"),
        # A model that vLLM refuses is left to torch, which ignores other flags.
        ({"engine_args": {"max_model_len": 64}}, "vllm", "--engine-args is for vLLM"),
    ],
)
def test_a_start_with_flags_that_its_engine_would_ignore_is_refused(
    cross_encoder: Path, settings: dict[str, object], engine: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reranker_service.loading.choose_engine", lambda _: engine)
    monkeypatch.setattr("reranker_service.loading.refused_by_vllm", lambda _: "a test")
    with pytest.raises(UnsupportedModelError, match=words):
        load(Settings(model=str(cross_encoder), **settings))


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, (128, 128)),
        ({"default_length": 20}, (128, 20)),
        ({"max_length": 30}, (30, 30)),
        ({"max_length": 30, "default_length": 20}, (30, 20)),
    ],
)
def test_the_longest_and_the_default_length(
    cross_encoder: Path, settings: dict[str, int], lengths: tuple[int, int]
) -> None:
    spec = choose_model(Settings(model=str(cross_encoder), **settings))
    assert (spec.max_length, spec.default_length) == lengths


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": 1000}, "--max-length 1000: .* takes at most 128"),
        ({"default_length": 1000}, "--default-length 1000: .* takes at most 128"),
        ({"max_length": 30, "default_length": 31}, "--default-length 31: --max-length allows at most 30"),
    ],
)
def test_lengths_that_cannot_be(cross_encoder: Path, settings: dict[str, int], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        choose_model(Settings(model=str(cross_encoder), **settings))


def test_large_messages_are_counted_and_parsed_off_the_event_loop(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both took up to 0.2 s for a message of 120,000 texts."""
    seen: list[tuple[str, bool, bool]] = []

    def watch(name: str, size: Callable[..., int]) -> None:
        original = getattr(Validator, name)

        def watched(*arguments: object) -> object:
            seen.append((name, size(*arguments), threading.current_thread() is threading.main_thread()))
            return original(*arguments)

        monkeypatch.setattr(Validator, name, watched)

    watch("size", lambda _, __, data: len(data) > MIB)
    watch("texts", lambda _, message, *__: len(message.texts) > 1000)

    async def scenario() -> None:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            stub = rpc.RerankerServiceStub(channel)
            await stub.Rerank(RERANK)
            assert len((await stub.Rerank(pb.RerankRequest(query="q", documents=["x" * 700_000] * 2))).results) == 2
            texts = [f"text {number}" for number in range(100_000)]
            grid = pb.PairGrid(query_ids=[0], document_ids=[99_999])
            chunk = pb.RerankStreamRequest(chunk=pb.StreamChunk(id=1, grid=grid))
            for sent in (texts, texts[:1]):
                messages = [OPEN, pb.RerankStreamRequest(texts=pb.StreamTexts(texts=sent)), chunk]
                replies = [reply async for reply in stub.RerankStream(iter(messages))]
                assert replies[1].result.HasField("scores") == (sent is texts)

    asyncio.run(scenario())
    assert {(name, large) for name, large, _ in seen} == {(one, size) for one in ("size", "texts") for size in (0, 1)}
    assert all(here != large for _, large, here in seen)


def test_many_texts_and_requests_give_other_calls_their_turn(cross_encoder: Path) -> None:
    """The event loop gets a turn between parts of a message: the most texts that it takes in without one."""

    async def scenario() -> tuple[int, int]:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            stub = rpc.RerankerServiceStub(channel)
            await stub.Rerank(RERANK)
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counted: list[int] = []
            adding = TableCosts.add
            rankings: list[int] = []
            ranking = Costs.ranking
            with (
                mock.patch.object(TableCosts, "add", lambda *one: counted.append(turns) or adding(*one)),
                mock.patch.object(Costs, "ranking", lambda *one: rankings.append(turns) or ranking(*one)),
            ):
                counter = asyncio.create_task(count())
                texts = pb.StreamTexts(texts=["text"] * 100_000)
                assert (
                    len([one async for one in stub.RerankStream(iter([OPEN, pb.RerankStreamRequest(texts=texts)]))])
                    == 1
                )
                requests = [pb.RerankRequest(query="q", documents=["d"] * 16)] * 1024
                reply = await stub.RerankBatch(pb.RerankBatchRequest(requests=requests))
                assert len(reply.items) == 1024
                counter.cancel()
            return len(set(counted)), len(set(rankings))

    slices, parts = asyncio.run(scenario())
    assert slices > 10
    assert parts > 10
