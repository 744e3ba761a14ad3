"""Metrics for Prometheus: counts equal the calls that were made, in a form that its parsers accept."""

from __future__ import annotations

import asyncio
import queue
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import grpc
import pytest
from grpc import aio
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.observing.metrics import Load
from reranker_service.observing.prometheus import PrometheusMetrics
from reranker_service.rpc.servicer import RPCS, SCORING_RPCS, RerankerServicer

from .scrapes import Scrape, scrape, scrape_text, scraped
from .servers import ServerProcess

DOCUMENTED = Path(__file__).parent.parent / "docs" / "metrics.md"
TEXTS = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["a query", "another query", "a document", "word " * 400]))
OPEN = pb.RerankStreamRequest(open=pb.StreamOpen())


@pytest.fixture(scope="module")
def server(cross_encoder: Path) -> Iterator[ServerProcess]:
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--metrics-port", "0"]
    with ServerProcess(*flags) as server:
        yield server


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[rpc.RerankerServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield rpc.RerankerServiceStub(channel)


def rerank(*documents: str, query: str = "a query", **more: object) -> pb.RerankRequest:
    return pb.RerankRequest(query=query, documents=documents, **more)


def chunk(number: int, queries: list[int], documents: list[int]) -> pb.RerankStreamRequest:
    grid = pb.PairGrid(query_ids=queries, document_ids=documents)
    return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, grid=grid))


def fails(call: object, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    assert caught.value.code() == code


def ended(server: ServerProcess, before: Scrape, streams: int) -> dict[tuple[str, ...], float]:
    """Counts of the streams since ``before``, by RPC and code, once ``streams`` of them have ended."""
    until = time.monotonic() + 60
    while True:
        change = (scrape(server) - before).by("reranker_requests_total", "rpc", "code")
        if sum(change.values()) >= streams or time.monotonic() > until:
            return change


def test_counts_equal_the_calls_and_their_usage(server: ServerProcess, stub: rpc.RerankerServiceStub) -> None:
    before = scrape(server)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    usages: list[tuple[str, pb.Usage]] = []

    usages += [("Rerank", stub.Rerank(rerank("a document", "word " * 400)).usage) for _ in range(2)]
    fails(lambda: stub.Rerank(rerank()), invalid)
    with grpc.insecure_channel(server.address) as channel:
        fails(lambda: channel.unary_unary("/reranker.v1.RerankerService/Rerank")(b"\x0a\x01\xff"), invalid)

    batch = pb.RerankBatchRequest(requests=[rerank("one", "one", "two"), rerank("one", top_n=0), rerank("three")])
    items = stub.RerankBatch(batch).items
    assert [item.WhichOneof("outcome") for item in items] == ["response", "error", "response"]
    usages += [("RerankBatch", item.response.usage) for item in (items[0], items[2])]
    fails(lambda: stub.RerankBatch(pb.RerankBatchRequest()), invalid)

    chunks = [chunk(1, [0, 1], [2, 3]), chunk(2, [0], [99]), chunk(3, [1], [0, 1, 2]), chunk(4, [0, 1], [2, 3])]
    results = [one.result for one in stub.RerankStream(iter([OPEN, TEXTS, *chunks]))][1:]
    assert sorted((one.id, one.WhichOneof("outcome")) for one in results) == [
        (1, "scores"),
        (2, "error"),
        (3, "scores"),
        (4, "scores"),
    ]
    usages += [("RerankStream", one.usage) for one in results if one.HasField("scores")]
    fails(lambda: stub.RerankStream(iter([TEXTS])), invalid)
    stub.GetModelInfo(pb.GetModelInfoRequest())

    change = scrape(server) - before
    assert change.by("reranker_requests_total", "rpc", "code") == {
        ("Rerank", "OK"): 2,
        ("Rerank", "INVALID_ARGUMENT"): 2,
        ("RerankBatch", "OK"): 1,
        ("RerankBatch", "INVALID_ARGUMENT"): 1,
        ("RerankStream", "OK"): 1,
        ("RerankStream", "INVALID_ARGUMENT"): 1,
        ("GetModelInfo", "OK"): 1,
    }
    assert change.by("reranker_request_duration_seconds_count", "rpc") == {
        ("Rerank",): 4,
        ("RerankBatch",): 2,
        ("RerankStream",): 2,
        ("GetModelInfo",): 1,
    }
    # A message that cannot be parsed and an invalid batch have no replies.
    assert change.by("reranker_replies_total", "rpc", "code") == {
        ("Rerank", "OK"): 2,
        ("Rerank", "INVALID_ARGUMENT"): 1,
        ("RerankBatch", "OK"): 2,
        ("RerankBatch", "INVALID_ARGUMENT"): 1,
        ("RerankStream", "OK"): 3,
        ("RerankStream", "INVALID_ARGUMENT"): 1,
    }
    sent = {"Rerank": 4, "RerankBatch": 4, "RerankStream": 11}
    pairs: Counter[str] = Counter()
    for (name, _), count in change.by("reranker_pairs_total", "rpc", "source").items():
        pairs[name] += int(count)
    assert pairs == sent
    expected: Counter[tuple[str, str]] = Counter()
    for name, usage in usages:
        expected["cache", name] += usage.cached_pairs
        expected["shared", name] += usage.shared_pairs
        expected["engine", name] += usage.pairs - usage.cached_pairs - usage.shared_pairs
        expected["truncated", name] += usage.truncated_pairs
        expected["tokens", name] += usage.tokens
    found = {
        (source, name): count for (name, source), count in change.by("reranker_pairs_total", "rpc", "source").items()
    }
    for what in ("truncated_pairs", "tokens"):
        by_rpc = change.by(f"reranker_{what}_total", "rpc").items()
        found |= {(what.removesuffix("_pairs"), name): count for (name,), count in by_rpc}
    assert found == {key: count for key, count in expected.items() if count}
    assert expected["truncated", "Rerank"] >= 1

    for stage in ("queue", "engine", "reply"):
        assert change[f"reranker_{stage}_seconds_count"] == len(usages)
    for stage in ("queue", "engine"):
        seconds = sum(getattr(usage, f"{stage}_seconds") for _, usage in usages)
        assert change[f"reranker_{stage}_seconds_sum"] == pytest.approx(seconds)


def test_a_stream_counts_as_open_until_its_client_is_gone(server: ServerProcess, stub: rpc.RerankerServiceStub) -> None:
    before = scrape(server)
    outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
    outgoing.put(OPEN)
    call = stub.RerankStream(iter(outgoing.get, None))
    assert next(call).HasField("opened")
    assert (scrape(server) - before)["reranker_requests_in_progress", "RerankStream"] == 1
    call.cancel()
    outgoing.put(None)
    assert ended(server, before, 1) == {("RerankStream", "CANCELLED"): 1}
    assert (scrape(server) - before)["reranker_requests_in_progress", "RerankStream"] == 0


def test_streams_that_their_client_cancels_count_as_cancelled(
    server: ServerProcess, stub: rpc.RerankerServiceStub
) -> None:
    """Up to 23 % of such streams count as OK where the end of their requests is taken for a half-close."""
    streams = 200
    before = scrape(server)
    for _ in range(streams):
        outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
        outgoing.put(OPEN)
        call = stub.RerankStream(iter(outgoing.get, None))
        assert next(call).HasField("opened")
        call.cancel()
        outgoing.put(None)
    assert ended(server, before, streams) == {("RerankStream", "CANCELLED"): streams}


class Cancelled:
    """The context of a call that its client has cancelled.

    The first ``read`` looks like a half-close, the next one reports the cancellation, ``abort`` fails.
    """

    def __init__(self) -> None:
        self.codes: list[grpc.StatusCode] = []
        self._reads = 0

    def set_code(self, code: grpc.StatusCode) -> None:
        self.codes.append(code)

    async def write(self, _: object) -> None:
        raise AssertionError("nothing to write")

    async def read(self) -> object:
        self._reads += 1
        if self._reads > 1:
            asyncio.current_task().cancel()
        await asyncio.sleep(0)
        return aio.EOF

    def trailing_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, *_: object, **__: object) -> None:
        raise aio.InternalError("the status cannot be sent")


def handled(rpc: str, request: object) -> tuple[BaseException, dict[tuple[str, ...], float], list[grpc.StatusCode]]:
    """End of a call whose client has gone: the handler's exception, the counts, and the codes set in the context."""
    metrics, context = PrometheusMetrics(RPCS, SCORING_RPCS), Cancelled()
    name = f"/reranker.v1.RerankerService/{rpc}"
    details = SimpleNamespace(method=name, invocation_metadata=())
    servicer = RerankerServicer(metrics)
    if rpc == "RerankStream":
        servicer.open(mock.Mock(), mock.Mock(), pb.GetModelInfoResponse())
    handler = servicer.handler().service(details)

    async def call() -> None:
        if handler.request_streaming:
            async for _ in handler.stream_stream(request, context):
                pass
        else:
            await handler.unary_unary(request, context)

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - CancelledError is no Exception
        asyncio.run(call())
    counts = scraped(generate_latest(metrics.registry).decode()).by("reranker_requests_total", "rpc", "code")
    return caught.value, counts, context.codes


def test_a_cancelled_stream_that_looks_half_closed_counts_as_cancelled() -> None:
    async def no_requests() -> AsyncIterator[pb.RerankStreamRequest]:
        return
        yield

    error, counts, codes = handled("RerankStream", no_requests())
    assert isinstance(error, asyncio.CancelledError)
    assert counts == {("RerankStream", "CANCELLED"): 1}
    assert codes[-1] == grpc.StatusCode.CANCELLED


def test_an_error_that_cannot_be_sent_counts_as_cancelled() -> None:
    error, counts, codes = handled("GetModelInfo", pb.GetModelInfoRequest())  # UNAVAILABLE: it is not open
    assert isinstance(error, aio.InternalError)
    assert counts == {("GetModelInfo", "CANCELLED"): 1}
    assert codes[-1] == grpc.StatusCode.CANCELLED


def test_the_model_is_named_and_the_engine_up(server: ServerProcess, stub: rpc.RerankerServiceStub) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    now = scrape(server)
    labels = ("model", "kind", "engine", "dtype", "fingerprint")
    expected = (info.model, "cross-encoder", "torch", "float32", info.fingerprint)
    assert now.by("reranker_model_info", *labels) == {expected: 1}
    assert now["reranker_engine_up"] == 1


def test_the_engine_is_up_from_the_first_score_to_its_death() -> None:
    metrics = PrometheusMetrics(RPCS, SCORING_RPCS)

    def up() -> float:
        return scraped(generate_latest(metrics.registry).decode())["reranker_engine_up"]

    states = [up()]
    metrics.serving({"model": "m", "kind": "bi-encoder"})
    states.append(up())
    metrics.engine_gone()
    assert [*states, up()] == [0, 1, 0]


def test_the_load_is_read_at_each_scrape() -> None:
    metrics = PrometheusMetrics(RPCS, SCORING_RPCS)
    loads = iter([Load(waiting=7, oldest_seconds=1.5, running=64, cache_bytes=4096, held_bytes=77), Load()])
    metrics.watch(lambda: next(loads))
    names = [
        "reranker_queue_sequences",
        "reranker_queue_age_seconds",
        "reranker_engine_sequences",
        "reranker_cache_bytes",
        "reranker_held_bytes",
    ]
    first, second = (scraped(generate_latest(metrics.registry).decode()) for _ in range(2))
    assert [first[name] for name in names] == [7, 1.5, 64, 4096, 77]
    assert [second[name] for name in names] == [0, 0, 0, 0, 0]


def test_names_types_and_histograms_follow_the_conventions(server: ServerProcess) -> None:
    text = scrape_text(server)
    ours = [family for family in text_string_to_metric_families(text) if family.name.startswith("reranker_")]
    assert len(ours) > 15
    for family in ours:
        assert family.documentation.endswith(".")
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", family.name)
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|percent)\b", family.name)
        assert len({(one.name, *sorted(one.labels.items())) for one in family.samples}) == len(family.samples)
        if family.type == "counter":
            assert {one.name for one in family.samples} == {f"{family.name}_total"}
        elif family.type == "histogram":
            by_labels: dict[tuple[str, ...], list[tuple[float, float]]] = {}
            for one in family.samples:
                if one.name.endswith("_bucket"):
                    labels = dict(one.labels)
                    bound = float(labels.pop("le"))
                    by_labels.setdefault(tuple(labels.values()), []).append((bound, one.value))
            counts = {tuple(one.labels.values()): one.value for one in family.samples if one.name.endswith("_count")}
            assert counts.keys() == by_labels.keys()
            for key, buckets in by_labels.items():
                assert buckets == sorted(buckets)
                assert [count for _, count in buckets] == sorted(count for _, count in buckets)
                assert buckets[-1] == (float("inf"), counts[key])
                if family.name.endswith("_seconds"):
                    assert buckets[0][0] <= 0.001
                    assert buckets[-2][0] >= 60
        else:
            assert family.type == "gauge"


def test_the_strict_openmetrics_parser_accepts_the_page(server: ServerProcess) -> None:
    text = scrape_text(server, accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert "reranker_pairs" in {family.name for family in openmetrics_families(text)}


def test_every_metric_is_documented_and_every_documented_one_exists(server: ServerProcess) -> None:
    rows = re.findall(r"^\| `(reranker_\w+)` \| (\w+) \|", DOCUMENTED.read_text(), re.MULTILINE)
    exposed = re.findall(r"^# TYPE (reranker_\w+) (\w+)$", scrape_text(server), re.MULTILINE)
    assert sorted(rows) == sorted(exposed)


def test_the_port_is_closed_at_the_end_and_the_exit_is_clean(cross_encoder: Path) -> None:
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--metrics-port", "0"]
    with ServerProcess(*flags) as server:
        assert "reranker_engine_up 1.0" in scrape_text(server)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        with pytest.raises(OSError, match="refused"):
            scrape_text(server)


def test_a_taken_metrics_port_is_an_error_at_once(cross_encoder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ["--model", str(cross_encoder), "--engine", "torch", "--metrics-port", str(taken.getsockname()[1])]
        with ServerProcess(*flags, ready=False) as server:
            line = server.line("cannot start metrics or tracing")
            assert server.wait() == 1
    assert "--metrics-port" in line
    assert "in use" in line
