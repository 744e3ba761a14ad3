"""RerankerClient with several servers: one job at all of them at once, late chunks, and names that are resolved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from chaos.ledger import CountedMatrix, counted_matrices
from loss_client import RerankerClient, RerankerError, RerankerRequestError, ScoreMatrix
from loss_client.client.addresses import parse_addresses
from loss_client.client.chunks import Chunk, grid_chunks
from loss_client.client.columns import Columns
from loss_client.client.endpoints import ChannelSettings
from loss_client.client.names import Names
from loss_client.client.window import Window
from reranker.v1 import reranker_pb2 as pb

from .certificates import Authority
from .stub_server import Abort, Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores, numbered_texts
from .test_client_failures import at_some_pace

WAIT_SECONDS = 30.0

Script = Callable[[ReceivedStream, ReceivedChunk], object]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    with counted_matrices():
        yield


def at_speed(seconds: float) -> Script:
    """Answer one chunk after the other, each after ``seconds``."""
    turn = asyncio.Lock()

    async def answer(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        async with turn:
            await asyncio.sleep(seconds)

    return answer


def check(matrix: ScoreMatrix, queries: Sequence[str], documents: Sequence[str]) -> None:
    """Wait for all scores, and check that each is right and was stored once."""
    assert isinstance(matrix, CountedMatrix)
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
    assert (matrix.arrivals == 1).all()


def pairs_of(server: StubServer) -> int:
    return sum(len(stream.chunks[number].pairs()) for stream in server.streams for number in stream.answered)


# One job at all servers


@pytest.mark.parametrize("listed", [False, True])
def test_a_job_uses_all_servers_and_fast_ones_get_more(listed: bool) -> None:
    queries, documents = numbered_texts("query", 64), numbered_texts("document", 64)
    with StubServer(on_chunk=at_speed(0.04)) as slow, StubServer(on_chunk=at_speed(0.01)) as fast:
        with StubServer(on_chunk=at_speed(0.04)) as other:
            with RerankerClient([slow.target, fast.target, other.target], timeout=WAIT_SECONDS) as client:
                if listed:
                    ids = np.indices((64, 64)).reshape(2, -1)
                    matrix = client.stream_pairs(queries, documents, *ids, chunk_pairs=32)
                    found = matrix.result(WAIT_SECONDS).reshape(64, 64)
                    assert matrix.usage.servers == 3
                    np.testing.assert_array_equal(found, hash_scores(queries, documents))
                else:
                    check(client.stream_grid(queries, documents, chunk_pairs=32), queries, documents)
            assert [len(server.streams) for server in (slow, fast, other)] == [1, 1, 1]
            assert pairs_of(fast) > 1.5 * max(pairs_of(slow), pairs_of(other))
            assert min(pairs_of(slow), pairs_of(other)) > 100


def test_a_small_job_opens_one_stream() -> None:
    with StubServer() as first, StubServer() as second, StubServer() as third:
        servers = (first, second, third)
        with RerankerClient([server.target for server in servers], timeout=WAIT_SECONDS) as client:
            for number in range(6):
                client.score_grid([f"q{number}"], numbered_texts("document", 32), chunk_pairs=16)
        assert [len(server.streams) for server in servers] == [2, 2, 2]


def test_a_server_that_answers_nothing_holds_a_few_chunks_which_others_answer_before_the_stall_limit() -> None:
    never = Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await never.wait()

    queries, documents = numbered_texts("query", 32), numbered_texts("document", 32)
    with StubServer(on_chunk=hold, contract=(1, 1)) as hung, StubServer(contract=(1, 1)) as good:
        with RerankerClient([hung.target, good.target], timeout=300.0) as client:
            matrix = client.stream_grid(queries, documents, chunk_pairs=16)
            check(matrix, queries, documents)
            hung.wait_for(lambda: hung.streams[0].ended)
        asked = [chunk for stream in hung.streams for chunk in stream.chunks]
        assert 1 <= len(asked) <= 2
        # On a busy machine the job's end may come before the last of its cancellations: then the call is cancelled.
        given_up, all_asked = sorted(hung.streams[0].given_up), [chunk.message.id for chunk in asked]
        assert given_up == all_asked or (hung.streams[0].cancelled and given_up == all_asked[: len(given_up)])
        assert matrix.usage.pairs == 1024
        assert matrix.usage.reconnects == 0
        assert matrix.usage.servers == 1  # the other one sent no score


def test_the_first_of_two_answers_counts_and_the_later_one_is_dropped() -> None:
    late, never = Gate(), Gate()
    queries, documents = numbered_texts("query", 32), numbered_texts("document", 32)
    repeated: list[ReceivedChunk] = []

    async def answer_late(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await late.wait()

    with StubServer(on_chunk=answer_late) as slow, StubServer() as fast:

        async def answer_one_repeated_chunk(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            if any(chunk.pairs() == one.pairs() for stream in slow.streams for one in stream.chunks):
                repeated.append(chunk)
                if len(repeated) == 2:
                    late.open()
                    await never.wait()

        fast.on_chunk = answer_one_repeated_chunk
        with RerankerClient([slow.target, fast.target], timeout=300.0) as client:
            matrix = client.stream_grid(queries, documents, chunk_pairs=16)
            check(matrix, queries, documents)
            assert matrix.usage.pairs == 1024
        assert len(repeated) == 2
        assert len(slow.streams[0].answered) >= 2


def test_chunks_of_a_lost_server_move_and_the_running_job_uses_the_server_when_it_is_back() -> None:
    queries, documents = numbered_texts("query", 64), numbered_texts("document", 64)
    with StubServer(on_chunk=at_speed(0.02)) as lost, StubServer(on_chunk=at_speed(0.02)) as kept:
        with RerankerClient([lost.target, kept.target], timeout=WAIT_SECONDS) as client:
            matrix = client.stream_grid(queries, documents, chunk_pairs=8)
            for server in (lost, kept):
                server.wait_for(lambda server=server: pairs_of(server) > 40)
            lost.stop()
            before = len(lost.streams)
            kept.wait_for(lambda: pairs_of(kept) > 200)
            lost.start()
            lost.wait_for(lambda: sum(len(stream.answered) for stream in lost.streams[before:]) > 2)
            lost.on_chunk = kept.on_chunk = None
            check(matrix, queries, documents)
            assert matrix.usage.reconnects >= 1


def test_an_error_that_would_come_again_ends_the_job_at_all_servers() -> None:
    async def refuse(stream: ReceivedStream, chunk: ReceivedChunk) -> pb.ChunkResult:
        raise Abort(grpc.StatusCode.INVALID_ARGUMENT, "no such instruction")

    queries, documents = numbered_texts("query", 64), numbered_texts("document", 64)
    with StubServer(on_chunk=at_speed(0.2)) as slow, StubServer(on_chunk=refuse) as refusing:
        with RerankerClient([slow.target, refusing.target], timeout=WAIT_SECONDS) as client:
            with pytest.raises(RerankerRequestError, match="no such instruction"):
                client.score_grid(queries, documents, chunk_pairs=16)
            for stream in slow.streams:
                slow.wait_for(lambda stream=stream: stream.ended)


def test_a_job_fails_at_its_deadline_if_no_server_finishes_work() -> None:
    never = Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await never.wait()

    def fail(pace: float) -> None:
        queries, documents = numbered_texts("query", 32), numbered_texts("document", 32)
        begun = time.monotonic()
        with StubServer(on_chunk=hold) as first, StubServer(on_chunk=hold) as second:
            with RerankerClient([first.target, second.target], timeout=pace) as client:
                with pytest.raises(RerankerError, match="0 of 1024 pairs are scored"):
                    client.score_grid(queries, documents, chunk_pairs=16)
        assert time.monotonic() - begun < 4 * pace

    at_some_pace(fail)


def test_a_server_without_streams_is_left_out_of_a_job_that_has_others() -> None:
    queries, documents = numbered_texts("query", 32), numbered_texts("document", 32)
    with StubServer(without={"RerankStream"}) as without, StubServer(on_chunk=at_speed(0.005)) as good:
        with RerankerClient([without.target, good.target], timeout=WAIT_SECONDS) as client:
            check(client.stream_grid(queries, documents, chunk_pairs=16), queries, documents)


def test_most_documents_go_to_one_server() -> None:
    queries, documents = numbered_texts("query", 256), numbered_texts("document", 256)

    def once_all_have_streams() -> Script:
        answer_in_turn = at_speed(0.01)

        async def answer(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            # On a busy machine the others can have done all work before a server's stream opens.
            for server in servers:
                await asyncio.to_thread(server.wait_for, lambda server=server: server.streams)
            await answer_in_turn(stream, chunk)

        return answer

    servers = [StubServer(on_chunk=once_all_have_streams()) for _ in range(4)]
    with servers[0], servers[1], servers[2], servers[3]:
        with RerankerClient([server.target for server in servers], timeout=WAIT_SECONDS) as client:
            check(client.stream_grid(queries, documents, chunk_pairs=128), queries, documents)
        sent = [sum(text.startswith("document") for text in server.streams[0].texts) for server in servers]
        assert all(len(server.streams) == 1 for server in servers)
    # Without columns of their own four times. A busy machine delays streams, which then take columns of others.
    assert sum(sent) < 3.2 * len(documents)


# The parts


def test_a_window_grows_with_what_a_server_answers_at_a_time() -> None:
    """A server that answers all pairs in 0.1 s gets more and more; one of 1,000 pairs/s gets work for 0.4 s at most."""
    parallel, steady = Window(100, 10_000), Window(100, 10_000)
    now, number, free = 0.0, 0, 0.0
    for _ in range(6):
        sent = []
        while parallel.open:
            parallel.sent(number, 100, now)
            sent.append(number)
            number += 1
        now += 0.1
        for one in sent:
            parallel.answered(one, now)
    assert parallel.pairs > 10_000
    assert parallel.in_flight == 0
    waiting: list[tuple[int, float]] = []
    now = 0.0
    for number in range(100):
        while steady.open:
            free = max(free, now) + 0.1
            waiting.append((number + 1000 * len(waiting), free))
            steady.sent(waiting[-1][0], 100, now)
        one, now = waiting.pop(0)
        steady.answered(one, now)
    assert 200 <= steady.pairs <= 400
    assert steady.rate == pytest.approx(1000, rel=0.1)


def test_a_window_asks_a_slow_server_for_small_chunks() -> None:
    window = Window(1000, 10_000)
    assert window.chunk_pairs == 256  # not known yet
    window.sent(0, 256, 0.0)
    window.answered(0, 5.12)
    assert window.chunk_pairs == 50
    window.sent(1, 50, 6.0)
    window.answered(1, 6.02)
    assert window.chunk_pairs == 1000


def test_columns_that_a_stream_has_had_come_first() -> None:
    def bands() -> Iterator[dict[int, Chunk]]:
        chunks = list(grid_chunks(24, 64, 64))  # blocks of 8 x 8
        for row in (0, 8, 16):
            yield {chunk.column_begin: chunk for chunk in reversed(chunks) if chunk.row_begin == row}

    first, second = Columns(), Columns()
    begins = []
    for band in bands():
        taken = [first.take(band).column_begin, second.take(band).column_begin, second.take(band).column_begin]
        taken += [first.take(band).column_begin for _ in range(5)]
        begins.append(taken)
        assert not band
    assert begins[0] == [0, 8, 16, 24, 32, 40, 48, 56]
    assert begins[1] == begins[2] == begins[0]


# Names


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of every host name; may be changed."""
    found: list[str] = ["127.0.0.1"]

    async def resolve(host: str, port: int) -> list[str]:
        if not found:
            raise OSError("no such name")
        return list(found)

    monkeypatch.setattr("loss_client.client.names.resolve_host", resolve)
    monkeypatch.setattr("loss_client.client.names.LOOK_SECONDS", 0.05)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_running_job_follows_the_addresses_of_a_name(addresses: list[str]) -> None:
    queries, documents = numbered_texts("query", 64), numbered_texts("document", 64)
    with StubServer(on_chunk=at_speed(0.01), host="127.0.0.1") as first:
        with StubServer(on_chunk=at_speed(0.01), host="127.0.0.2", port=first.port) as second:
            with RerankerClient(f"reranker.test:{first.port}", timeout=WAIT_SECONDS) as client:
                assert [state.condition for state in client.servers] == ["unused"]
                matrix = client.stream_grid(queries, documents, chunk_pairs=8)
                first.wait_for(lambda: first.streams and len(first.streams[0].answered) > 2)
                addresses.append("127.0.0.2")
                second.wait_for(lambda: second.streams and len(second.streams[0].answered) > 2)
                assert sorted(state.address for state in client.servers) == [
                    f"127.0.0.1:{first.port} (reranker.test)",
                    f"127.0.0.2:{first.port} (reranker.test)",
                ]
                first.on_chunk = second.on_chunk = None
                check(matrix, queries, documents)
                first.on_chunk, second.on_chunk = at_speed(0.02), at_speed(0.02)
                matrix = client.stream_grid(queries, documents, chunk_pairs=8)
                for server in (first, second):
                    server.wait_for(lambda server=server: len(server.streams) > 1 and server.streams[1].answered)
                addresses.remove("127.0.0.1")
                leaving = first.streams[1]
                first.wait_for(lambda: leaving.half_closed)
                first.wait_for(lambda: leaving.ended)
                assert not leaving.cancelled
                assert len(leaving.answered) == len(leaving.chunks)
                assert not matrix.done()
                second.on_chunk = None
                check(matrix, queries, documents)
                asked = len(first.streams)
                addresses.clear()  # a name server that is away changes nothing
                time.sleep(0.1)
                for number in range(3):
                    client.score_grid([f"q{number}"], ["d"])
                assert len(first.streams) == asked
                assert [state.address for state in client.servers] == [f"127.0.0.2:{first.port} (reranker.test)"]


def test_an_unknown_name_gives_grpcs_error_and_is_looked_up_again(addresses: list[str]) -> None:
    addresses.clear()
    with StubServer() as server, RerankerClient(f"reranker.invalid:{server.port}", timeout=1.0) as client:
        with pytest.raises(RerankerError, match=r"reranker\.invalid"):
            client.score_grid(["q"], ["d"])
        addresses.append("127.0.0.1")
        assert client.score_grid(["q"], ["d"], timeout=WAIT_SECONDS).shape == (1, 1)


def test_the_certificate_is_for_the_name_and_not_for_the_address(addresses: list[str], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for name, right in (("reranker.test", True), ("other.test", False)):
        cert, key = authority.issue("server", name)
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
        with StubServer(credentials=credentials) as server:
            address = f"grpcs://reranker.test:{server.port}"
            with RerankerClient(
                address, timeout=WAIT_SECONDS if right else 1.0, root_certificates=authority.ca
            ) as client:
                if right:
                    assert client.score_grid(["q"], ["d"]).shape == (1, 1)
                else:
                    with pytest.raises(RerankerError):
                        client.score_grid(["q"], ["d"])


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("gpu:50051", ("gpu", 50051)),
        ("grpcs://gpu.example.org:443", ("gpu.example.org", 443)),
        ("dns:///gpu:50051", ("gpu", 50051)),
        ("dns://8.8.8.8/gpu:50051", None),
        ("dns:///gpu", None),
        ("localhost:1", None),
        ("127.0.0.1:1", None),
        ("10.0.0.7:1", None),
        ("[2001:db8::1]:1", None),
        ("ipv4:10.0.0.7:1", None),
        ("unix:/run/reranker", None),
        ("unix-abstract:123", None),
        ("xds:///gpu", None),
    ],
)
def test_host_names_are_told_from_other_addresses(written: str, name: tuple[str, int] | None) -> None:
    (address,) = parse_addresses(written)
    assert address.name == name
    if name is not None:
        assert address.at("2001:db8::1").target == f"[2001:db8::1]:{name[1]}"
        assert address.at("10.0.0.7").authority == f"{name[0]}:{name[1]}"
        settings = ChannelSettings((address,))
        assert Names(settings, environment={"https_proxy": "http://proxy:3128"}).endpoints[0].address == address
        assert Names(settings, environment={}).any
