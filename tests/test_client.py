"""RerankerClient against servers on loopback: exact scores, readable early, every text and pair sent once."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loss_client import (
    ClientClosedError,
    JobCancelledError,
    RerankerClient,
    RerankerTimeoutError,
)
from reranker.v1 import reranker_pb2 as pb
from tests.stub_server import (
    Gate,
    ReceivedChunk,
    ReceivedStream,
    StubServer,
    hash_scores,
    numbered_texts,
)

WAIT_SECONDS = 30.0

Threads = Callable[[], list[threading.Thread]]


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


@pytest.fixture
def client(server: StubServer) -> Iterator[RerankerClient]:
    with RerankerClient(server.target, timeout=WAIT_SECONDS) as reranker:
        yield reranker


@pytest.fixture
def client_threads() -> Threads:
    """The threads of this test's clients; threads of other tests' clients may still run."""

    def now() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "reranker-client"]

    before = now()
    return lambda: [thread for thread in now() if thread not in before]


# Right scores


@pytest.mark.parametrize(("rows", "columns", "chunk_pairs"), [(1, 1, 1), (5, 7, 1), (40, 30, 128), (3, 500, 64)])
def test_grid(client: RerankerClient, rows: int, columns: int, chunk_pairs: int) -> None:
    queries, documents = numbered_texts("query", rows), numbered_texts("document", columns)
    scores = client.score_grid(queries, documents, chunk_pairs=chunk_pairs)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, hash_scores(queries, documents))


def test_pairs_keep_their_order_and_equal_ones_are_sent_once(client: RerankerClient, server: StubServer) -> None:
    generator = np.random.default_rng(0)
    queries, documents = numbered_texts("query", 12), numbered_texts("document", 20)
    pairs = [(queries[generator.integers(12)], documents[generator.integers(20)]) for _ in range(500)]
    scores = client.score_pairs(pairs, chunk_pairs=64)
    assert scores.shape == (500,)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [hash_scores([query], [document])[0, 0] for query, document in pairs])
    (stream,) = server.streams
    assert sorted(stream.pairs()) == sorted(set(pairs))
    assert len(stream.texts) == len({text for pair in pairs for text in pair})


def test_duplicates_in_a_grid_are_sent_and_scored_once(client: RerankerClient, server: StubServer) -> None:
    queries = ["a", "b", "a", "c", "b", "a"]
    documents = ["x", "a", "x", "y", "a", "z", "x"]
    matrix = client.stream_grid(queries, documents)
    np.testing.assert_array_equal(matrix.result(), hash_scores(queries, documents))
    server.wait_for(lambda: server.streams[0].half_closed)
    assert sorted(server.streams[0].texts) == ["a", "b", "c", "x", "y", "z"]
    assert sorted(server.streams[0].pairs()) == sorted((q, d) for q in "abc" for d in "xayz")
    assert matrix.usage.pairs == 12
    assert matrix.usage.tokens == 120


def test_options_reach_the_server(client: RerankerClient, server: StubServer) -> None:
    options = {"instruction": "find it", "max_length": 64, "score_type": "raw"}
    expected = pb.RerankOptions(instruction="find it", max_length=64, score_type=pb.SCORE_TYPE_RAW)
    reference = hash_scores(["q"], ["d", "e"], expected)
    np.testing.assert_array_equal(client.score_grid(["q"], ["d", "e"], **options), reference)
    np.testing.assert_array_equal(client.score_pairs([("q", "d"), ("q", "e")], **options), reference[0])
    ranked = client.rerank("q", ["d", "e"], **options)
    assert {each.index: each.score for each in ranked} == dict(enumerate(reference[0].tolist()))
    assert server.streams[0].open.options == expected
    assert server.streams[0].open.priority == pb.PRIORITY_BULK
    client.stream_grid(["q"], ["d"], priority="interactive").result()
    assert server.streams[-1].open.priority == pb.PRIORITY_INTERACTIVE
    assert not server.streams[-1].open.options.HasField("instruction")
    client.stream_grid(["q"], ["d"], instruction="").result()
    assert server.streams[-1].open.options.HasField("instruction")


def test_nothing_to_score_needs_no_server() -> None:
    with RerankerClient("127.0.0.1:1") as client:
        assert client.score_grid([], ["d"]).shape == (0, 1)
        assert client.score_grid(["q", "r"], []).shape == (2, 0)
        assert client.score_pairs([]).shape == (0,)


def test_rerank(client: RerankerClient) -> None:
    documents = numbered_texts("document", 9)
    scores = hash_scores(["query"], documents)[0]
    ranked = client.rerank("query", documents)
    assert [each.index for each in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert [each.score for each in ranked] == sorted(scores.tolist(), reverse=True)
    assert all(each.document is None for each in ranked)
    best = client.rerank("query", documents, 3, return_documents=True)
    assert [each.index for each in best] == [each.index for each in ranked[:3]]
    assert [each.document for each in best] == [documents[each.index] for each in best]


def test_model_info(client: RerankerClient, server: StubServer) -> None:
    info = client.model_info()
    assert (info.model, info.fingerprint, info.limits) == ("stub", "stub", server.limits)


def test_use_from_several_threads(client: RerankerClient, client_threads: Threads) -> None:
    def score(part: int) -> bool:
        queries, documents = numbered_texts(f"query {part}", 20), numbered_texts(f"document {part}", 30)
        pairs = list(zip(queries, documents, strict=False))
        return np.array_equal(
            client.score_grid(queries, documents, chunk_pairs=32), hash_scores(queries, documents)
        ) and np.array_equal(client.score_pairs(pairs), hash_scores(queries, documents).diagonal())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(score, range(16), timeout=WAIT_SECONDS))
    assert len(client_threads()) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queries": "q", "documents": ["d"]}, TypeError, "queries is a single str"),
        ({"queries": ["q"], "documents": [None]}, TypeError, r"documents\[0\] is not a string"),
        ({"queries": ["q"], "documents": ["d"], "score_type": "logit"}, ValueError, "'probability', 'raw'"),
        ({"queries": ["q"], "documents": ["d"], "priority": "high"}, ValueError, "'bulk', 'interactive'"),
        ({"queries": ["q"], "documents": ["d"], "chunk_pairs": 0}, ValueError, "1 or more"),
        ({"queries": ["q"], "documents": ["d"], "timeout": 0}, ValueError, "positive number of seconds"),
        ({"queries": ["q"], "documents": ["d"], "max_length": -1}, ValueError, "max_length is -1"),
    ],
)
def test_wrong_arguments(client: RerankerClient, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        client.stream_grid(**arguments)


# Early scores, few bytes


def test_rows_are_readable_before_the_job_ends(server: StubServer, client: RerankerClient) -> None:
    gate = Gate()
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)

    async def hold_later_rows(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if queries[0] not in chunk.queries:
            await gate.wait()

    server.on_chunk = hold_later_rows
    matrix = client.stream_grid(queries, documents, chunk_pairs=16)  # blocks of 4 x 4
    reference = hash_scores(queries, documents)
    np.testing.assert_array_equal(matrix.rows(0, 4, WAIT_SECONDS), reference[:4])
    assert not matrix.done()
    with pytest.raises(RerankerTimeoutError):
        matrix.rows(4, 5, timeout=0.05)
    gate.open()
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), reference)


def test_replies_may_come_in_any_order(server: StubServer, client: RerankerClient) -> None:
    gates = [Gate() for _ in range(16)]
    gates[-1].open()

    async def last_first(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await gates[chunk.number].wait()
        gates[chunk.number - 1].open()

    server.on_chunk = last_first
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)
    matrix = client.stream_grid(queries, documents, chunk_pairs=16)
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
    assert server.streams[0].answered == list(range(15, -1, -1))


def test_texts_go_out_as_chunks_need_them_in_messages_of_at_most_a_mebibyte(
    server: StubServer, client: RerankerClient
) -> None:
    texts_before: list[int] = []

    async def note_texts(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        texts_before.append(len(stream.texts))

    server.on_chunk = note_texts
    queries = [f"{name} " + "q" * 300_000 for name in numbered_texts("query", 10)]
    documents = numbered_texts("document", 192)
    scores = client.score_grid(queries, documents, chunk_pairs=128)
    np.testing.assert_array_equal(scores, hash_scores(queries, documents))
    (stream,) = server.streams
    assert texts_before[0] == 8 + 16
    assert sorted(stream.texts) == sorted(queries + documents)
    assert max(stream.text_messages) <= 1 << 20
    assert len(stream.chunks[0].queries) == 8


def test_many_small_chunks_and_large_texts_do_not_block_each_other(client: RerankerClient) -> None:
    queries, documents = [name + "q" * 20_000 for name in numbered_texts("query", 60)], numbered_texts("document", 60)
    scores = client.score_grid(queries, documents, chunk_pairs=2)
    np.testing.assert_array_equal(scores, hash_scores(queries, documents))


# The server's limits


def test_chunks_keep_to_the_servers_limit(server: StubServer, client: RerankerClient) -> None:
    server.limits.max_pairs_per_chunk = 10
    queries, documents = numbered_texts("query", 9), numbered_texts("document", 11)
    np.testing.assert_array_equal(client.score_grid(queries, documents), hash_scores(queries, documents))
    pairs = list(zip(queries, documents, strict=False)) * 3
    client.score_pairs(pairs)
    assert max(len(chunk.pairs()) for stream in server.streams for chunk in stream.chunks) <= 10


def test_a_job_with_more_chunks_than_a_stream_takes_is_split(server: StubServer, client: RerankerClient) -> None:
    server.limits.max_chunks_per_stream = 5
    queries, documents = numbered_texts("query", 8), numbered_texts("document", 16)
    matrix = client.stream_grid(queries, documents, chunk_pairs=16)
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
    assert [len(stream.chunks) for stream in server.streams] == [5, 3]


@pytest.mark.parametrize("limit", ["texts", "bytes"])
def test_a_job_with_more_texts_than_a_stream_takes_is_split(
    server: StubServer, client: RerankerClient, limit: str
) -> None:
    queries, documents = numbered_texts("query", 30), numbered_texts("document", 50)
    size = len(documents[-1].encode())
    if limit == "texts":
        server.limits.max_texts_per_stream = 20
    else:
        server.limits.max_text_bytes_per_stream = 20 * size
    matrix = client.stream_grid(queries, documents, chunk_pairs=16)
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries, documents))
    np.testing.assert_array_equal(
        client.score_pairs(list(zip(queries, documents, strict=False))), hash_scores(queries, documents).diagonal()
    )
    for stream in server.streams:
        assert len(stream.texts) <= (20 if limit == "texts" else 30)
        assert sum(len(text.encode()) for text in stream.texts) <= 20 * size
    assert len(server.streams) >= 15
    assert len(server.streams) <= 30
    assert matrix.usage.reconnects == 0


# Several servers


def test_jobs_and_calls_go_to_each_server_in_turn() -> None:
    with StubServer() as first, StubServer() as second, RerankerClient([first.target, second.target]) as client:
        for position in range(6):
            client.score_grid([f"q{position}"], ["d"])
        assert [len(first.streams), len(second.streams)] == [3, 3]
        for _ in range(4):
            client.rerank("q", ["d"])
        assert [len(first.requests), len(second.requests)] == [2, 2]


def test_metadata_travels_with_every_call(server: StubServer) -> None:
    with RerankerClient(server.target, metadata=[("authorization", "Bearer token")]) as client:
        client.score_grid(["q"], ["d"])
    assert server.streams[0].metadata["authorization"] == "Bearer token"


# The life of a client


def test_cancel_reaches_the_server(server: StubServer, client: RerankerClient) -> None:
    never = Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await never.wait()

    server.on_chunk = hold
    matrix = client.stream_grid(["q"], ["d"])
    server.wait_for(lambda: server.streams and server.streams[0].chunks)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(matrix.result)
        matrix.cancel()
        with pytest.raises(JobCancelledError):
            waiting.result(WAIT_SECONDS)
    server.wait_for(lambda: server.streams[0].cancelled)
    server.on_chunk = None
    assert client.score_grid(["q"], ["d"]).shape == (1, 1)


def test_close_wakes_waiting_readers_with_an_error(server: StubServer, client_threads: Threads) -> None:
    never = Gate()

    async def hold(*_: object) -> None:
        await never.wait()

    server.on_chunk = server.on_request = hold
    client = RerankerClient(server.target)
    matrix = client.stream_grid(["q"], ["d"])
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(matrix.result), pool.submit(client.rerank, "q", ["d"])]
        server.wait_for(lambda: server.requests and server.streams and server.streams[0].chunks)
        client.close()
        for each in waiting:
            with pytest.raises(ClientClosedError):
                each.result(WAIT_SECONDS)
    server.wait_for(lambda: server.streams[0].cancelled)
    client.close()
    with pytest.raises(ClientClosedError, match="the client is closed"):
        client.score_grid(["q"], ["d"])
    assert client_threads() == []


def test_a_client_begins_nothing_until_it_is_used(server: StubServer, client_threads: Threads) -> None:
    client = RerankerClient(server.target)
    assert client_threads() == []
    client.close()


def test_a_client_without_references_ends_once_its_jobs_are_done(server: StubServer, client_threads: Threads) -> None:
    gate = Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await gate.wait()

    server.on_chunk = hold
    matrix = RerankerClient(server.target).stream_grid(["q"], ["d"])
    (thread,) = client_threads()
    server.wait_for(lambda: server.streams and server.streams[0].chunks)
    gc.collect()
    gate.open()
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(["q"], ["d"]))
    server.wait_for(lambda: server.streams[0].half_closed)
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


def test_a_copy_connects_by_itself(server: StubServer, client: RerankerClient) -> None:
    client.model_info()
    with pickle.loads(pickle.dumps(client)) as copy:
        np.testing.assert_array_equal(copy.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
