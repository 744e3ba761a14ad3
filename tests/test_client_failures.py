"""RerankerClient against servers that fail, refuse, stall, answer wrongly or have another contract."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from loss_client import (
    IncompatibleServerError,
    ModelChangedError,
    RerankerClient,
    RerankerError,
    RerankerRequestError,
    RerankerTimeoutError,
    RerankerUnavailableError,
    ScoreError,
)
from loss_client.client.endpoints import Endpoint
from loss_client.client.patience import Patience
from reranker.v1 import reranker_pb2 as pb
from tests.stub_server import (
    Abort,
    Gate,
    ReceivedChunk,
    ReceivedStream,
    StubServer,
    default_limits,
    hash_scores,
    numbered_texts,
    status_of,
)

WAIT_SECONDS = 30.0


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


@pytest.fixture
def client(server: StubServer) -> Iterator[RerankerClient]:
    with RerankerClient(server.target, timeout=WAIT_SECONDS) as reranker:
        yield reranker


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return the number of failed attempts so far; the first failure also moves every client past its deadline."""
    counted = []
    failed, remaining = Endpoint.failed, Patience.remaining

    def count(endpoint: Endpoint, now: float) -> None:
        failed(endpoint, now)
        counted.append(endpoint)

    monkeypatch.setattr(Endpoint, "failed", count)
    monkeypatch.setattr(Patience, "remaining", lambda self: 0.0 if counted else remaining(self))
    return lambda: len(counted)


def at_some_pace(check: Callable[[float], None]) -> None:
    """Repeat a test that depends on time at slower paces: a slow machine passes one of them, a fault fails all."""
    for pace in (1, 4):
        try:
            return check(pace)
        except (RerankerError, AssertionError):
            continue
    return check(16)


# Servers that fail


def test_after_a_crash_only_what_had_no_answer_is_sent_again(server: StubServer, client: RerankerClient) -> None:
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)
    never = Gate()

    async def answer_first_band(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if queries[0] not in chunk.queries:
            await never.wait()

    server.on_chunk = answer_first_band
    matrix = client.stream_grid(queries, documents, chunk_pairs=16)
    matrix.rows(0, 4, WAIT_SECONDS)
    server.wait_for(lambda: server.streams[0].half_closed)
    server.stop()
    server.on_chunk = None
    server.start()
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
    first, second = server.streams
    assert sorted(first.pairs()) == sorted((query, document) for query in queries for document in documents)
    assert sorted(second.pairs()) == sorted((query, document) for query in queries[4:] for document in documents)
    assert sorted(second.texts) == sorted(queries[4:] + documents)
    assert matrix.usage.reconnects == 1
    assert matrix.usage.pairs == 256


def test_a_crash_while_texts_are_being_sent(server: StubServer, client: RerankerClient) -> None:
    queries, documents = [name + "q" * 100_000 for name in numbered_texts("query", 40)], numbered_texts("document", 40)
    crashed = threading.Event()

    async def crash_once(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if not crashed.is_set():
            crashed.set()
            raise Abort(grpc.StatusCode.UNAVAILABLE, "going down")

    server.on_chunk = crash_once
    matrix = client.stream_grid(queries, documents, chunk_pairs=8)
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
    assert matrix.usage.reconnects == 1
    assert len(server.streams) == 2


def test_a_chunk_that_the_server_could_not_score_now_is_sent_again(server: StubServer, client: RerankerClient) -> None:
    failed = threading.Event()

    async def fail_once(stream: ReceivedStream, chunk: ReceivedChunk) -> pb.ChunkResult | None:
        if chunk.number == 1 and not failed.is_set():
            failed.set()
            return pb.ChunkResult(error=status_of(grpc.StatusCode.UNAVAILABLE, "draining"))
        return None

    server.on_chunk = fail_once
    queries, documents = numbered_texts("query", 8), numbered_texts("document", 16)
    scores = client.score_grid(queries, documents, chunk_pairs=16)
    np.testing.assert_array_equal(scores, hash_scores(queries, documents))
    assert failed.is_set()


@pytest.mark.parametrize(
    "end",
    [
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),  # a server whose grace period is over
    ],
)
def test_a_stream_that_ends_early_is_resumed(
    server: StubServer, client: RerankerClient, end: tuple[grpc.StatusCode, str]
) -> None:
    async def leave_out_first(stream: ReceivedStream, chunk: ReceivedChunk) -> pb.ChunkResult | None:
        if stream.number == 0 and chunk.number == 0:
            raise Abort(*end)
        return None

    server.on_chunk = leave_out_first
    np.testing.assert_array_equal(client.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
    assert len(server.streams) == 2


def test_a_server_that_stays_away(server: StubServer, failures: Callable[[], int]) -> None:
    server.stop()
    with RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        with pytest.raises(RerankerUnavailableError) as caught:
            client.score_grid(numbered_texts("query", 3), numbered_texts("document", 4))
        message = str(caught.value)
        assert f"no progress for 30 s with {server.target}: 1 attempts; the last error:" in message
        assert "UNAVAILABLE" in message
        assert "0 of 12 pairs are scored, 12 are left" in message
    assert failures() == 1


@pytest.mark.parametrize("use", [lambda client: client.rerank("q", ["d"]), lambda client: client.model_info()])
def test_a_server_that_stays_away_for_a_call(
    server: StubServer, failures: Callable[[], int], use: Callable[[RerankerClient], object]
) -> None:
    server.stop()
    with RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        with pytest.raises(RerankerUnavailableError, match="1 attempts"):
            use(client)
    assert failures() == 1


def test_a_server_that_goes_away_for_good(server: StubServer, failures: Callable[[], int]) -> None:
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)
    never = Gate()

    async def answer_first_band(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if queries[0] not in chunk.queries:
            await never.wait()

    server.on_chunk = answer_first_band
    with RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        matrix = client.stream_grid(queries, documents, chunk_pairs=16)
        matrix.rows(0, 4, WAIT_SECONDS)
        server.stop()
        with pytest.raises(RerankerUnavailableError, match="64 of 256 pairs are scored, 192 are left"):
            matrix.result(WAIT_SECONDS)
        matrix.rows(0, 4)  # rows that arrived stay readable
    assert failures() == 1


def test_patience_runs_out_while_a_server_stays_away(server: StubServer) -> None:
    def check(pace: float) -> None:
        with RerankerClient(server.target, timeout=pace) as client:
            with pytest.raises(RerankerUnavailableError, match=r"([2-9]|\d\d) attempts"):
                client.score_grid(["q"], ["d"])

    server.stop()
    at_some_pace(check)


def test_a_server_that_stalls(server: StubServer) -> None:
    never = Gate()

    async def hold(*_: object) -> None:
        await never.wait()

    def check(pace: float) -> None:
        with RerankerClient(server.target, timeout=pace / 2) as client:
            with pytest.raises(RerankerTimeoutError, match=rf"sent nothing for {pace / 2:g} s; 0 of 1 pairs"):
                client.score_grid(["q"], ["d"])
            assert server.streams
            server.wait_for(lambda: server.streams[0].cancelled)
            with pytest.raises(RerankerTimeoutError):
                client.rerank("q", ["d"])
            with pytest.raises(RerankerTimeoutError, match=r"0\.1 s"):
                client.score_grid(["q"], ["d"], timeout=0.1)

    server.on_chunk = server.on_request = hold
    at_some_pace(check)


def test_a_short_call_gets_its_attempt_after_others_failed(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loss_client.client.endpoints._generator.uniform", lambda low, high: 60.0)  # seconds of rest
    stalled, never = True, Gate()

    async def hold(*_: object) -> None:
        if stalled:
            await never.wait()

    server.on_chunk = hold
    with RerankerClient(server.target, timeout=0.05) as client:
        for _ in range(2):
            with pytest.raises(RerankerTimeoutError, match=r"sent nothing for 0\.05 s"):
                client.score_grid(["q"], ["d"])
        stalled = False
        np.testing.assert_array_equal(client.score_grid(["q"], ["d"], timeout=WAIT_SECONDS), hash_scores(["q"], ["d"]))


def test_progress_begins_the_timeout_anew(server: StubServer) -> None:
    documents = numbered_texts("document", 6)

    def check(pace: float) -> None:
        turn = asyncio.Lock()

        async def slowly(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            async with turn:
                await asyncio.sleep(0.3 * pace)  # the speed of the server; the test itself does not wait

        server.on_chunk = slowly
        with RerankerClient(server.target, timeout=pace) as client:
            scores = client.score_grid(["q"], documents, chunk_pairs=1)
        np.testing.assert_array_equal(scores, hash_scores(["q"], documents))

    at_some_pace(check)


@pytest.mark.parametrize("where", ["chunk", "stream", "unary"])
def test_an_error_tells_what_the_server_refused_in_full(server: StubServer, client: RerankerClient, where: str) -> None:
    refusal = (grpc.StatusCode.INVALID_ARGUMENT, "1 field is wrong", [("options.max_length", "9999: at most 512")])

    async def refuse(*_: object) -> pb.ChunkResult:
        if where == "chunk":
            return pb.ChunkResult(error=status_of(*refusal))
        raise Abort(*refusal)

    server.on_chunk = server.on_request = refuse
    ask = client.rerank if where == "unary" else client.score_grid
    with pytest.raises(RerankerRequestError) as caught:
        ask("q" if where == "unary" else ["q"], ["d"], max_length=9999)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message == "1 field is wrong"
    assert [(each.field, each.description) for each in error.violations] == refusal[2]
    assert "options.max_length: 9999: at most 512" in str(error)
    assert len(server.streams) + len(server.requests) == 1  # without a retry


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (pb.ChunkResult(scores=pb.Scores(values=[0.5, float("nan")])), "not finite"),
        (pb.ChunkResult(scores=pb.Scores(values=[0.5, float("inf")])), "not finite"),
        (pb.ChunkResult(scores=pb.Scores(values=[0.5])), "2 pairs with 1 scores"),
        (pb.ChunkResult(scores=pb.Scores(values=[0.5] * 3)), "2 pairs with 3 scores"),
        (pb.ChunkResult(id=77, scores=pb.Scores(values=[0.5, 0.5])), "chunk 77"),
        (pb.ChunkResult(), "neither scores nor an error"),
    ],
)
def test_answers_that_cannot_be_scores(
    server: StubServer, client: RerankerClient, result: pb.ChunkResult, message: str
) -> None:
    async def answer(stream: ReceivedStream, chunk: ReceivedChunk) -> pb.ChunkResult:
        return result

    server.on_chunk = answer
    with pytest.raises(ScoreError, match=message):
        client.score_grid(["q"], ["d", "e"])


def test_scores_of_two_models_are_not_mixed(server: StubServer, client: RerankerClient) -> None:
    async def answer_first(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if chunk.number:
            server.fingerprint = "another"
            raise Abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    server.on_chunk = answer_first
    with pytest.raises(ModelChangedError, match=r"model stub and cannot continue at .* with another"):
        client.score_grid(["q"], ["d", "e"], chunk_pairs=1)


def test_unary_calls_are_made_again(server: StubServer, client: RerankerClient) -> None:
    async def fail_twice(request: object) -> None:
        if len(server.requests) < 3:
            raise Abort(grpc.StatusCode.UNAVAILABLE, "not yet")

    server.on_request = fail_twice
    assert client.rerank("q", ["d"])[0].score == hash_scores(["q"], ["d"])[0, 0]
    assert len(server.requests) == 3


# Other servers


@pytest.mark.parametrize("contract", [(0, 9), (2, 0)])
def test_another_contract_is_refused(contract: tuple[int, int]) -> None:
    with StubServer(contract=contract) as server, RerankerClient(server.target) as client:
        needs = f"speaks contract {contract[0]}.{contract[1]}; this client needs 1.x"
        for use in (client.model_info, lambda: client.score_grid(["q"], ["d"]), lambda: client.rerank("q", ["d"])):
            with pytest.raises(IncompatibleServerError, match=needs):
                use()
        assert not server.streams


def test_a_newer_minor_version_is_taken() -> None:
    with StubServer(contract=(1, 7)) as server, RerankerClient(server.target) as client:
        assert client.score_grid(["q"], ["d"]).shape == (1, 1)


def test_another_service_is_refused() -> None:
    everything = {"Rerank", "RerankBatch", "RerankStream", "GetModelInfo"}
    with StubServer(without=everything) as server, RerankerClient(server.target) as client:
        with pytest.raises(IncompatibleServerError, match="does not serve"):
            client.score_grid(["q"], ["d"])


def test_without_streams_scores_come_by_batches_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    limits = default_limits()
    limits.max_requests_per_batch, limits.max_documents_per_request, limits.max_pairs_per_batch = 6, 7, 15
    queries, documents = numbered_texts("query", 10), numbered_texts("document", 20)
    with (
        caplog.at_level(logging.WARNING),
        StubServer(limits=limits, without={"RerankStream"}) as server,
        RerankerClient(server.target) as client,
    ):
        matrix = client.stream_grid(queries, [*documents, documents[0]], score_type="raw")
        raw = pb.RerankOptions(score_type=pb.SCORE_TYPE_RAW)
        np.testing.assert_array_equal(matrix.result(), hash_scores(queries, [*documents, documents[0]], raw))
        assert matrix.usage.pairs == 200
        pairs = [(queries[i % 7], documents[i % 11]) for i in range(100)]
        expected = [hash_scores([query], [document])[0, 0] for query, document in pairs]
        np.testing.assert_array_equal(client.score_pairs(pairs), expected)
    for request in server.requests:
        assert len(request.requests) <= 6
        assert max(len(each.documents) for each in request.requests) <= 7
        assert sum(len(each.documents) for each in request.requests) <= 15
    assert [record.message for record in caplog.records if "RerankStream" in record.message] != []
    assert len([record for record in caplog.records if "RerankStream" in record.message]) == 1


def test_without_streams_errors_arrive_too() -> None:
    async def refuse(request: pb.RerankBatchRequest) -> pb.RerankBatchResponse:
        status = status_of(grpc.StatusCode.INVALID_ARGUMENT, "no", [("query", "too long")])
        return pb.RerankBatchResponse(items=[pb.RerankBatchItem(error=status)] * len(request.requests))

    with StubServer(without={"RerankStream"}, on_request=refuse) as server, RerankerClient(server.target) as client:
        with pytest.raises(RerankerRequestError, match="query: too long"):
            client.score_grid(["q"], ["d"])


def test_a_job_goes_on_at_another_server() -> None:
    never, gate = Gate(), Gate()
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)
    with StubServer() as dying, StubServer() as living:

        async def answer_nothing(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            await never.wait()

        async def answer_late(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            await gate.wait()

        dying.on_chunk, living.on_chunk = answer_nothing, answer_late
        with RerankerClient([dying.target, living.target]) as client:
            matrix = client.stream_grid(queries, documents, chunk_pairs=16)
            dying.wait_for(lambda: dying.streams and dying.streams[0].chunks)
            living.wait_for(lambda: living.streams and living.streams[0].chunks)
            dying.stop()
            gate.open()
            np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
            assert sorted(living.streams[0].pairs()) == sorted((q, d) for q in queries for d in documents)
            assert (len(dying.streams), len(living.streams)) == (1, 1)
            for _ in range(6):
                client.score_grid(["q"], ["d"])
            assert (len(dying.streams), len(living.streams)) == (1, 7)
