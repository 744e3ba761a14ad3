"""Listed pairs: each is scored once, and remembered only for the same model and options."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from loss_client.client.client import RerankerClient
from loss_client.client.memory import PairKeys, ScoreMemory

from .stub_server import Abort, ReceivedChunk, ReceivedStream, StubServer, hash_scores

WAIT_SECONDS = 20.0
QUERIES, DOCUMENTS = ["q0", "q1", "q0"], ["d0", "d1", "d2", "d1"]


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as running:
        yield running


@pytest.fixture
def client(server: StubServer) -> Iterator[RerankerClient]:
    with RerankerClient(server.target, timeout=WAIT_SECONDS) as made:
        yield made


def asked(server: StubServer) -> int:
    return sum(len(chunk.pairs()) for stream in server.streams for chunk in stream.chunks)


def test_listed_pairs_have_a_row_each_and_equal_ones_are_asked_for_once(
    server: StubServer, client: RerankerClient
) -> None:
    queries, documents = np.array([2, 1, 0, 0, 1]), np.array([0, 3, 1, 3, 1])
    matrix = client.stream_pairs(QUERIES, DOCUMENTS, queries, documents, chunk_pairs=2)
    assert matrix.shape == (5, 1)
    expected = hash_scores(QUERIES, DOCUMENTS)[queries, documents]
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS)[:, 0], expected)
    np.testing.assert_array_equal(matrix.rows(1, 3)[:, 0], expected[1:3])
    assert asked(server) == 3  # (q0, d0), (q1, d1), (q0, d1)


@pytest.mark.parametrize(
    ("queries", "documents", "error"), [([3], [0], IndexError), ([0], [-1], IndexError), ([0, 1], [0], ValueError)]
)
def test_positions_out_of_range_are_refused(
    client: RerankerClient, queries: list[int], documents: list[int], error: type[Exception]
) -> None:
    with pytest.raises(error, match="_ids"):
        client.stream_pairs(QUERIES, DOCUMENTS, queries, documents)


def test_a_pair_is_remembered(server: StubServer, client: RerankerClient) -> None:
    pairs = [("q0", "d0"), ("q1", "d1")]
    first = client.score_pairs(pairs)
    assert asked(server) == 2
    matrix = client.stream_pairs(["q2", "q1", "q0"], ["d0", "d1"], [0, 1, 2], [0, 1, 0])
    found = matrix.result(WAIT_SECONDS)[:, 0]
    np.testing.assert_array_equal(found, [hash_scores(["q2"], ["d0"])[0, 0], first[1], first[0]])
    assert asked(server) == 3
    assert (matrix.usage.pairs, matrix.usage.client_cached_pairs) == (3, 2)
    np.testing.assert_array_equal(client.score_pairs(pairs), first)
    assert asked(server) == 3


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        (("q", "d"), {"instruction": "other"}),
        (("q", "d"), {"max_length": 99}),
        (("q", "d"), {"score_type": "raw"}),
        (("d", "q"), {}),
        (("q ", "d"), {}),
        (("qd", ""), {}),
    ],
)
def test_near_misses_are_asked_for(
    server: StubServer, client: RerankerClient, pair: tuple[str, str], options: dict[str, object]
) -> None:
    client.score_pairs([("q", "d")])
    client.score_pairs([pair], **options)  # type: ignore[arg-type]
    assert asked(server) == 2


def test_another_model_is_asked_anew(server: StubServer, client: RerankerClient) -> None:
    client.score_pairs([("q", "d")])
    server.fingerprint = "another model"
    client.score_pairs([("q", "d")])
    assert asked(server) == 2


def test_the_memory_can_be_turned_off_and_has_a_limit(server: StubServer) -> None:
    with RerankerClient(server.target, cache_pairs=0, timeout=WAIT_SECONDS) as client:
        client.score_pairs([("q", "d")])
        client.score_pairs([("q", "d")])
    assert asked(server) == 2
    with RerankerClient(server.target, cache_pairs=3, timeout=WAIT_SECONDS) as client:
        client.score_pairs([("q", f"d{number}") for number in range(10)])
        assert len(client._memory) == 3
    with pytest.raises(ValueError, match="cache_pairs is -1"):
        RerankerClient(server.target, cache_pairs=-1)


def known(memory: ScoreMemory, keys: str, *, recurring: bool = False) -> str:
    """Return those of some one-letter keys that have a score in the memory."""
    found = memory.get([key.encode() for key in keys], recurring)
    assert all(np.isnan(score) or score == ord(key) for key, score in zip(keys, found, strict=True))
    return "".join(key for key, score in zip(keys, found, strict=True) if not np.isnan(score))


def keep(memory: ScoreMemory, keys: str, *, recurring: bool) -> None:
    memory.put([key.encode() for key in keys], np.array([ord(key) for key in keys], np.float32), recurring)


@pytest.mark.parametrize("recurring", [False, True])
def test_the_last_used_are_kept(recurring: bool) -> None:
    memory = ScoreMemory(2)
    keep(memory, "ab", recurring=recurring)
    assert known(memory, "a") == "a"
    keep(memory, "c", recurring=recurring)
    assert known(memory, "abc") == "ac"


def test_pairs_that_recur_are_kept_before_others() -> None:
    memory = ScoreMemory(4)
    keep(memory, "abc", recurring=True)
    keep(memory, "vwxyz", recurring=False)
    assert known(memory, "abcvwxyz") == "abcz"
    keep(memory, "d", recurring=True)  # takes the space of the others
    assert known(memory, "abcdz") == "abcd"
    keep(memory, "z", recurring=False)
    assert known(memory, "abcdz") == "abcd"
    keep(memory, "e", recurring=True)
    assert known(memory, "abcde") == "bcde"
    assert len(memory) == 4


def test_a_pair_that_turns_out_to_recur_stays() -> None:
    memory = ScoreMemory(2)
    keep(memory, "a", recurring=False)
    assert known(memory, "a", recurring=True) == "a"
    keep(memory, "xyz", recurring=False)
    assert known(memory, "axyz") == "az"


def test_a_client_remembers_what_recurs_however_much_else_it_scores(server: StubServer) -> None:
    every = range(2)
    with RerankerClient(server.target, cache_pairs=8, timeout=WAIT_SECONDS) as client:
        client.stream_pairs(["q0", "q1"], ["d0", "d1"], every, every).result(WAIT_SECONDS)
        others = [f"d{number}" for number in range(2, 40)]
        passing = client.stream_pairs(["q0"] * 38, others, range(38), range(38), recurring=False)
        passing.result(WAIT_SECONDS)
        again = client.stream_pairs(["q0", "q1"], ["d0", "d1"], every, every)
        again.result(WAIT_SECONDS)
        assert again.usage.client_cached_pairs == 2
        assert len(client._memory) == 8


def test_scope_and_text_cannot_run_into_each_other() -> None:
    def key(scope: bytes, text: str) -> bytes:
        position = np.zeros(1, dtype=np.int64)
        return next(PairKeys(scope, [text]).of(position, position))

    assert key(b"ab", "c") != key(b"a", "bc")
    assert key(b"a", "b") == key(b"a", "b")


def test_a_broken_stream_asks_only_for_what_is_left(server: StubServer, client: RerankerClient) -> None:
    known = [(f"q{number}", "d") for number in range(0, 40, 2)]
    client.score_pairs(known)
    before = asked(server)
    broken: list[int] = []

    async def break_once(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if chunk.number == 3 and not broken:
            broken.append(chunk.number)
            raise Abort(grpc.StatusCode.UNAVAILABLE, "gone")

    server.on_chunk = break_once
    every = [(f"q{number}", "d") for number in range(40)]
    found = client.score_pairs(every, chunk_pairs=4)
    assert broken
    np.testing.assert_array_equal(found, hash_scores([query for query, _ in every], ["d"])[:, 0])
    assert 20 <= asked(server) - before < 40
