"""RerankerClient with servers that hang, are slow but alive, are full, or still load their model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from loss_client import (
    IncompatibleServerError,
    RerankerClient,
    RerankerRequestError,
    RerankerTimeoutError,
    RerankerUnavailableError,
)
from loss_client.client.addresses import Address
from loss_client.client.endpoints import ChannelSettings, Endpoint
from reranker.v1 import reranker_pb2 as pb
from tests.stub_server import (
    Abort,
    Gate,
    ReceivedChunk,
    ReceivedStream,
    StubServer,
    hash_scores,
    numbered_texts,
    status_of,
)
from tests.test_client_failures import at_some_pace

WAIT_SECONDS = 30.0


# Stalls


@pytest.mark.parametrize("hangs", ["connection", "engine"])
def test_another_server_takes_over_from_one_that_hangs(hangs: str) -> None:
    never = Gate()

    async def hold(*_: object) -> None:
        await never.wait()

    with StubServer() as hung, StubServer() as good, RerankerClient([hung.target, good.target], timeout=60) as client:
        hung.on_chunk = hung.on_request = hold
        if hangs == "connection":
            hung.on_info = hold
        begun = time.monotonic()
        for position in range(6):
            scores = client.score_grid([f"q{position}"], ["d"], timeout=3)
            np.testing.assert_array_equal(scores, hash_scores([f"q{position}"], ["d"]))
            assert client.rerank(f"q{position}", ["d"], timeout=3)[0].score == scores[0, 0]
        # One stall of 1 s for the first job or call; then the hung server rests for longer than the others take.
        assert time.monotonic() - begun < 10
        assert len(hung.streams) + len(hung.requests) <= 2
        assert [state.condition for state in client.servers] == ["stalled", "working"]


def test_a_job_of_a_stalled_server_goes_on_elsewhere_with_the_chunks_that_are_left() -> None:
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)
    never, gate = Gate(), Gate()

    async def answer_first_band(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if queries[0] not in chunk.queries:
            await never.wait()

    async def answer_late(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await gate.wait()

    with StubServer() as stalled, StubServer() as other:
        stalled.on_chunk, other.on_chunk = answer_first_band, answer_late
        with RerankerClient([stalled.target, other.target], timeout=WAIT_SECONDS, stall_timeout=0.5) as client:
            matrix = client.stream_grid(queries, documents, chunk_pairs=16)
            stalled.wait_for(lambda: stalled.streams and len(stalled.streams[0].chunks) > 2)
            other.wait_for(lambda: other.streams and other.streams[0].chunks)
            gate.open()
            np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
            streams = [stalled.streams[0], *other.streams]
            answered = [stream.chunks[number] for stream in streams for number in stream.answered]
            pairs = [pair for chunk in answered for pair in chunk.pairs()]
            assert sorted(pairs) == sorted((q, d) for q in queries for d in documents)
            stalled.wait_for(lambda: stalled.streams[0].cancelled)


def test_a_silent_server_of_contract_1_0_that_is_alone_keeps_the_whole_timeout() -> None:
    async def slowly(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await asyncio.sleep(0.6)  # longer than a third of the timeout

    with StubServer(on_chunk=slowly) as server, RerankerClient(server.target, timeout=1.5) as client:
        assert client.score_grid(["q"], ["d"]).shape == (1, 1)
        assert len(server.streams) == 1


def test_servers_that_all_hang_are_told_from_servers_that_are_away() -> None:
    never = Gate()

    async def hold(*_: object) -> None:
        await never.wait()

    with StubServer(on_chunk=hold) as first, StubServer(on_chunk=hold) as second:
        with RerankerClient([first.target, second.target], timeout=1.2) as client:
            with pytest.raises(RerankerTimeoutError, match=r"no progress for 1\.2 s .* sent nothing for .* 1 are left"):
                client.score_grid(["q"], ["d"])
        assert first.streams
        assert second.streams


# Slow servers


def test_streams_of_a_slow_server_live_while_it_sends_progress() -> None:
    def check(pace: float) -> None:
        turn = asyncio.Lock()

        async def one_at_a_time(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            async with turn:
                await asyncio.sleep(0.2 * pace)

        with StubServer(contract=(1, 1), on_chunk=one_at_a_time) as server:
            # Sixteen streams take 3.2 s together. Without the messages most of them would hear nothing for that time.
            with RerankerClient(server.target, timeout=pace) as client, ThreadPoolExecutor(16) as pool:
                grids = list(pool.map(lambda number: client.score_grid([f"q{number}"], ["d"]), range(16)))
            assert len(server.streams) == 16
        np.testing.assert_array_equal(np.concatenate(grids), hash_scores([f"q{number}" for number in range(16)], ["d"]))

    at_some_pace(check)


def test_the_client_asks_for_progress_well_inside_the_stall_limit() -> None:
    with StubServer() as server:
        for options, seconds in (
            ({}, 5.0),
            ({"timeout": 6.0}, 0.5),
            ({"timeout": 0.9}, 0.1),
            ({"stall_timeout": 2.0}, 0.5),
        ):
            with RerankerClient(server.target, **options) as client:
                client.score_grid(["q"], ["d"])
            assert server.streams[-1].open.progress_seconds == pytest.approx(seconds)


def test_an_error_tells_a_busy_server_from_a_silent_one() -> None:
    never = Gate()

    async def hold(*_: object) -> None:
        await never.wait()

    with StubServer(contract=(1, 1), on_chunk=hold) as server, RerankerClient(server.target, timeout=0.9) as client:
        server.ahead = 5000
        with pytest.raises(RerankerTimeoutError, match="is alive and busy: 5000 pairs ahead of 1 of this job"):
            client.stream_grid(["q"], ["d"]).result(WAIT_SECONDS)
        assert len(server.streams) == 1
        server.silent = True
        with pytest.raises(RerankerTimeoutError, match="sent nothing for"):
            client.score_grid(["q"], ["d"])
        assert len(server.streams) > 2  # the stall limit ended the first attempts


def test_a_server_that_is_alive_but_finishes_nothing_is_left_for_another() -> None:
    never = Gate()

    async def hold(*_: object) -> None:
        await never.wait()

    with StubServer(contract=(1, 1), on_chunk=hold) as stuck, StubServer(contract=(1, 1)) as good:
        with RerankerClient([stuck.target, good.target], timeout=1.5) as client:
            for _ in range(2):
                np.testing.assert_array_equal(client.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
        assert stuck.streams


def test_a_limit_that_passed_while_the_process_stood_still_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        asked.set()
        await answers.wait()

    with StubServer(on_chunk=hold) as server, RerankerClient(server.target, timeout=1.0) as client:
        matrix = client.stream_grid(["q"], ["d"])
        assert asked.wait(WAIT_SECONDS)
        loop = client._calls.background._loop
        assert loop is not None

        def stand_still() -> None:
            answers.open()
            time.sleep(2.0)

        loop.call_soon_threadsafe(stand_still)
        np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(["q"], ["d"]))
        assert len(server.streams) == 1


# Rest and backoff


def endpoint() -> Endpoint:
    return Endpoint(Address("127.0.0.1:1", secure=False), ChannelSettings(()))


@pytest.mark.parametrize(("failures", "longest"), [(1, 0.1), (2, 0.2), (4, 0.8), (9, 5.0)])
def test_a_backoff_doubles_and_has_full_jitter(failures: int, longest: float) -> None:
    """The clients of a server that failed come back spread over the whole backoff, not together at its end."""
    delays = []
    for _ in range(300):
        failing = endpoint()
        for _ in range(failures):
            failing.failed(now=0.0)
        delays.append(failing.ready_at)
    assert 0 <= min(delays) < longest / 10
    assert 0.9 * longest < max(delays) <= longest


def test_a_server_rests_longer_after_each_stall_and_longer_than_after_a_failure() -> None:
    async def scenario() -> None:
        failing, stalled = endpoint(), endpoint()
        failing.failed(now=0.0)
        for limits in (2, 4, 8, 16, 16):
            await stalled.stalled(now=0.0, limit=3.0)
            assert failing.ready_at < 3.0 * limits / 2 <= stalled.rests_until <= 3.0 * limits
        assert failing.rests_until == 0

    asyncio.run(scenario())


# Full servers


@pytest.mark.parametrize("where", ["opening", "chunk", "unary", "batch"])
def test_a_full_server_is_asked_again_after_the_delay_that_it_names(where: str) -> None:
    times: list[float] = []
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the budget of texts is used up", (), 0.3)

    async def refuse_once(*_: object) -> object:
        times.append(time.monotonic())
        if len(times) > 1:
            return None
        if where == "chunk":
            return pb.ChunkResult(error=status_of(*full))
        raise Abort(*full)

    with StubServer(without={"RerankStream"} if where == "batch" else set()) as server:
        server.on_chunk = server.on_request = refuse_once  # type: ignore[assignment]
        with RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
            if where == "unary":
                assert client.rerank("q", ["d"])[0].score == hash_scores(["q"], ["d"])[0, 0]
            else:
                np.testing.assert_array_equal(client.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
    assert len(times) == 2
    assert times[1] - times[0] >= 0.3


def test_another_server_is_asked_while_one_is_full() -> None:
    async def refuse(*_: object) -> None:
        raise Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (), 60.0)

    with StubServer(on_chunk=refuse) as full, StubServer() as free:
        with RerankerClient([full.target, free.target], timeout=WAIT_SECONDS) as client:
            for _ in range(4):
                np.testing.assert_array_equal(client.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
        assert len(full.streams) == 1


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "raise the server's limits"),  # without RetryInfo: a message is too large
        (grpc.StatusCode.UNAUTHENTICATED, "no token.*valid credentials"),
        (grpc.StatusCode.PERMISSION_DENIED, "does not allow this call"),
    ],
)
def test_errors_that_would_come_again_end_the_job_at_once_and_say_what_to_do(code: grpc.StatusCode, hint: str) -> None:
    async def refuse(*_: object) -> None:
        raise Abort(code, "no")

    with StubServer(on_chunk=refuse) as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        with pytest.raises(RerankerRequestError, match=f"{code.name}: .*no .*{hint}"):
            client.score_grid(["q"], ["d"])
        assert len(server.streams) == 1


# Servers that are not ready yet


def test_the_client_waits_until_a_server_is_ready_and_reports_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loss_client.client.ready._REPORT_SECONDS", 0.05)
    reports: list[str] = []
    enough = threading.Event()

    async def load() -> None:
        if not enough.is_set():
            raise Abort(grpc.StatusCode.UNAVAILABLE, "the model is still loading")

    def note(report: str) -> None:
        reports.append(report)
        if "still loading" in report:
            enough.set()

    with StubServer() as server, RerankerClient(server.target) as client:
        server.on_info = load
        assert client.wait_until_ready(WAIT_SECONDS, note).fingerprint == "stub"
    assert "of 30 s for the reranker" in reports[-1]


def test_waiting_for_a_server_ends_in_time_or_at_once_where_it_is_of_no_use() -> None:
    with RerankerClient("127.0.0.1:1") as client:
        with pytest.raises(RerankerUnavailableError, match=r"no progress for 0\.3 s"):
            client.wait_until_ready(0.3)
        with pytest.raises(ValueError, match="timeout is 0"):
            client.wait_until_ready(0)
    with StubServer(contract=(2, 0)) as server, RerankerClient(server.target) as client:
        with pytest.raises(IncompatibleServerError):
            client.wait_until_ready(WAIT_SECONDS)


# Chunk sizes


@pytest.mark.parametrize(("chosen", "sizes"), [(None, [40, 24]), (16, [16] * 4)])
def test_chunks_have_the_size_that_the_server_prefers_unless_the_caller_chooses(
    chosen: int | None, sizes: list[int]
) -> None:
    queries, documents = numbered_texts("query", 1), numbered_texts("document", 64)
    with StubServer(contract=(1, 1), preferred_pairs=40) as server, RerankerClient(server.target) as client:
        for ask in (client.stream_grid, client.score_grid):
            np.asarray(ask(queries, documents, chunk_pairs=chosen))
        client.score_pairs([(queries[0], document) for document in documents], chunk_pairs=chosen)
        found = [[len(chunk.pairs()) for chunk in stream.chunks] for stream in server.streams]
    assert found == [[32, 32] if chosen is None else sizes] * 2 + [sizes]


@pytest.mark.parametrize(
    ("contract", "preferred", "chosen", "largest"),
    [((1, 1), 0, None, 1024), ((1, 1), 200, None, 200), ((1, 1), 0, 150, 150), ((1, 0), 0, None, 128)],
)
def test_chunks_grow_unless_a_number_is_named_or_an_answer_is_the_only_sign_of_work(
    contract: tuple[int, int], preferred: int, chosen: int | None, largest: int
) -> None:
    queries, documents = numbered_texts("query", 256), numbered_texts("document", 256)

    def score(queries: Sequence[str], documents: Sequence[str], options: pb.RerankOptions) -> NDArray[np.float32]:
        return np.zeros((len(queries), len(documents)), dtype=np.float32)

    with (
        StubServer(score, contract=contract, preferred_pairs=preferred) as server,
        RerankerClient(server.target) as client,
    ):
        assert client.stream_grid(queries, documents, chunk_pairs=chosen).result().shape == (256, 256)
        sizes = [len(chunk.queries) * len(chunk.documents) for chunk in server.streams[0].chunks]
    assert sum(sizes) == 256 * 256
    assert max(sizes) <= largest
    assert max(sizes) > largest // 2
    assert sizes[0] <= (chosen or preferred or 128)
