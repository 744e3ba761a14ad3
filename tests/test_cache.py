"""The cache answers a pair only if every part of its key is equal; pairs in flight are scored once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc import aio

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.scheduling import Ticket
from reranker_service.scoring.cache import ScoreCache, digest_of, scope_of
from reranker_service.scoring.texts import TextTable

from .servers import ControlledEngine, ServerProcess, serve_in_process

MEBIBYTE = 1 << 20


def request(query: str = "a query", documents: tuple[str, ...] = ("one", "two"), **options: object) -> pb.RerankRequest:
    return pb.RerankRequest(query=query, documents=documents, options=pb.RerankOptions(**options))


def chunk(number: int, queries: list[int], documents: list[int]) -> pb.RerankStreamRequest:
    grid = pb.PairGrid(query_ids=queries, document_ids=documents)
    return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, grid=grid))


def opening(*texts: str, **options: object) -> list[pb.RerankStreamRequest]:
    return [
        pb.RerankStreamRequest(open=pb.StreamOpen(options=pb.RerankOptions(**options))),
        pb.RerankStreamRequest(texts=pb.StreamTexts(texts=texts)),
    ]


def scores(response: pb.RerankResponse) -> list[float]:
    return [one.score for one in sorted(response.results, key=lambda one: one.index)]


@pytest.mark.parametrize("kind", ["cross_encoder", "causal_reranker", "bi_encoder"])
def test_a_second_call_is_answered_from_the_cache_with_the_same_bits(kind: str, request: pytest.FixtureRequest) -> None:
    server: ServerProcess = request.getfixturevalue(f"{kind}_server")
    ask = pb.RerankRequest(query="only asked for here", documents=[f"cached document {i}" for i in range(40)])
    with grpc.insecure_channel(server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        first, second = stub.Rerank(ask), stub.Rerank(ask)
    assert (first.usage.cached_pairs, first.usage.pairs) == (0, 40)
    assert (second.usage.cached_pairs, second.usage.pairs, second.usage.tokens) == (40, 40, 0)
    assert scores(first) == scores(second)


NEAR_MISSES = {
    "instruction": request(instruction="other"),
    "empty instruction": request(instruction=""),
    "max_length": request(max_length=1000),
    "over_long": request(over_long=pb.OVER_LONG_REJECT),
    "swapped texts": request("one", ("a query",)),
    "query with a space": request("a query "),
    "query in another case": request("A query"),
    "separators moved": request("a", ("query one", "query two")),
    "empty query": request("", ("a queryone",)),
    "separator in the document": request("a query", ("one\x00two",)),
    "another form of the same letter": request("a quer\u00fd", ("one",)),
}


def test_a_near_miss_is_no_hit(causal_reranker: Path) -> None:
    async def scenario() -> dict[str, int]:
        async with serve_in_process(causal_reranker, ControlledEngine(), cache_bytes=MEBIBYTE) as channel:
            stub = rpc.RerankerServiceStub(channel)
            await stub.Rerank(request())
            assert (await stub.Rerank(request())).usage.cached_pairs == 2
            # The near misses also differ from each other.
            return {name: (await stub.Rerank(near)).usage.cached_pairs for name, near in NEAR_MISSES.items()}

    assert asyncio.run(scenario()) == dict.fromkeys(NEAR_MISSES, 0)


def test_both_score_types_come_from_one_raw_score(cross_encoder: Path) -> None:
    async def scenario() -> tuple[pb.RerankResponse, pb.RerankResponse]:
        async with serve_in_process(cross_encoder, ControlledEngine(), cache_bytes=MEBIBYTE) as channel:
            stub = rpc.RerankerServiceStub(channel)
            raw = await stub.Rerank(request(score_type=pb.SCORE_TYPE_RAW))
            return raw, await stub.Rerank(request())

    raw, probability = asyncio.run(scenario())
    assert probability.usage.cached_pairs == 2
    np.testing.assert_allclose(scores(probability), 1 / (1 + np.exp(-np.array(scores(raw)))), rtol=1e-6)


def test_without_a_cache_everything_is_scored_again(cross_encoder: Path) -> None:
    async def scenario() -> int:
        engine = ControlledEngine()
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            for _ in range(2):
                assert (await stub.Rerank(request())).usage.cached_pairs == 0
        return sum(map(len, engine.batches))

    assert asyncio.run(scenario()) == 4


def test_identical_pairs_in_flight_are_scored_once(cross_encoder: Path) -> None:
    async def scenario() -> tuple[int, list[pb.Usage], list[list[float]]]:
        engine = ControlledEngine(open_gate=False)
        messages = [*opening("q", "one", "two words", "one"), chunk(1, [0], [1, 2]), chunk(2, [0], [3, 2])]
        async with serve_in_process(cross_encoder, engine, cache_bytes=MEBIBYTE) as channel:

            async def send() -> object:
                for message in messages:
                    yield message

            stub = rpc.RerankerServiceStub(channel)
            first, second = (stub.RerankStream(send()) for _ in range(2))
            await engine.wait_for_sequences(2)
            engine.gate.set()
            results = []
            for call in (first, second):
                while (reply := await call.read()) is not aio.EOF:
                    if reply.HasField("result"):
                        results.append(reply.result)
        return (
            sum(map(len, engine.batches)),
            [one.usage for one in results],
            [list(one.scores.values) for one in results],
        )

    computed, usages, found = asyncio.run(scenario())
    assert computed == 2
    assert sum(one.shared_pairs + one.cached_pairs for one in usages) == 6
    assert all(one == found[0] for one in found)


def test_a_failed_caller_does_not_fail_the_callers_that_wait_for_it() -> None:
    async def scenario() -> tuple[int, int]:
        cache = ScoreCache(MEBIBYTE)
        digests = [digest_of(text) for text in "qd"]
        ids = np.array([0]), np.array([1])
        first = await cache.claim(b"s", digests, *ids, share=True)
        second = await cache.claim(b"s", digests, *ids, share=True)
        assert len(second.mine) == 0
        cache.settle(first, None)
        await asyncio.wait(second.waits)
        third = await cache.claim(b"s", digests, *ids, share=True)
        cache.settle(third, np.float32([0.5]))
        fourth = await cache.claim(b"s", digests, *ids, share=True)
        return len(third.mine), len(fourth.known)

    assert asyncio.run(scenario()) == (1, 1)


def test_a_caller_that_does_not_share_does_not_wait() -> None:
    async def scenario() -> tuple[list[int], list[int], list[int]]:
        cache = ScoreCache(MEBIBYTE)
        digests = [digest_of(text) for text in "qd"]
        ids = np.array([0]), np.array([1])
        bulk = await cache.claim(b"s", digests, *ids, share=True)
        urgent = await cache.claim(b"s", digests, *ids, share=False)
        cache.settle(urgent, np.float32([0.25]))
        # The score is cached, though the bulk caller has not settled yet.
        third = await cache.claim(b"s", digests, *ids, share=True)
        cache.settle(bulk, np.float32([0.25]))
        return bulk.mine.tolist(), urgent.mine.tolist(), third.known.tolist()

    assert asyncio.run(scenario()) == ([0], [0], [0])


def test_the_cache_stays_within_its_bytes_and_drops_the_least_recently_used() -> None:
    async def scenario() -> tuple[bool, bool, int]:
        cache = ScoreCache(200_000)
        documents = [digest_of(f"document {i}") for i in range(100)]
        for number in range(50):
            digests = [digest_of(f"query {number}"), *documents]
            claim = await cache.claim(b"s", digests, np.zeros(100, dtype=np.int64), np.arange(1, 101), share=True)
            cache.settle(claim, np.arange(100, dtype=np.float32))
            assert cache.size_bytes <= 200_000

        async def known(number: int) -> bool:
            digests = [digest_of(f"query {number}"), documents[7]]
            claim = await cache.claim(b"s", digests, np.array([0]), np.array([1]), share=True)
            cache.settle(claim, np.zeros(len(claim.mine), dtype=np.float32))
            return bool(len(claim.known)) and claim.scores[0] == 7

        return await known(49), await known(0), cache.size_bytes

    newest, oldest, size = asyncio.run(scenario())
    assert newest
    assert not oldest
    assert size > 100_000


def test_a_row_larger_than_the_cache_is_not_kept() -> None:
    async def scenario() -> int:
        cache = ScoreCache(10_000)
        digests = [digest_of(str(i)) for i in range(1001)]
        claim = await cache.claim(b"s", digests, np.zeros(1000, dtype=np.int64), np.arange(1, 1001), share=True)
        cache.settle(claim, np.zeros(1000, dtype=np.float32))
        return cache.size_bytes

    assert asyncio.run(scenario()) == 0


def test_scopes_differ_wherever_a_part_differs() -> None:
    parts = [("a", 1, True), ("a", 1, False), ("a", 11, True), ("a1", 1, True), (None, 1, True), ("None", 1, True)]
    parts += [("a", "1", True), ("", "a1", True)]
    assert len({scope_of(*one) for one in parts}) == len(parts)


def test_many_rows_are_claimed_and_settled_a_step_at_a_time() -> None:
    """16,384 pairs of distinct queries: the event loop gets its turn after every few hundred of them."""

    async def scenario() -> tuple[list[int], list[int]]:
        count = 16_384
        cache = ScoreCache(64 * MEBIBYTE)
        digests = [digest_of(str(number)) for number in range(2 * count)]
        queries, documents = np.arange(count), np.arange(count, 2 * count)
        turns, seen = 0, []

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(take_turns())
        claim = await cache.claim(b"s", digests, queries, documents, share=True)
        seen.append(turns)
        await cache.settle_in_steps(claim, np.arange(count, dtype=np.float32)[claim.mine])
        seen.append(turns)
        other.cancel()
        again = await cache.claim(b"s", digests, queries, documents, share=True)
        assert np.array_equal(again.scores, np.arange(count))
        return seen, [len(claim.mine), len(again.known)]

    turns, sizes = asyncio.run(scenario())
    assert sizes == [16_384, 16_384]
    assert turns[0] >= 16
    assert turns[1] - turns[0] >= 16


def test_a_caller_that_is_cancelled_between_two_steps_frees_its_pairs() -> None:
    async def scenario() -> int:
        cache = ScoreCache(MEBIBYTE)
        digests = [digest_of(str(number)) for number in range(4000)]
        ids = np.arange(2000), np.arange(2000, 4000)
        caller = asyncio.create_task(cache.claim(b"s", digests, *ids, share=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller})
        assert caller.cancelled()
        return len((await cache.claim(b"s", digests, *ids, share=True)).mine)

    assert asyncio.run(scenario()) == 2000


def test_long_texts_are_hashed_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, bool]] = []

    def watched(text: str) -> bytes:
        hashed.append((len(text), threading.current_thread() is threading.main_thread()))
        return digest_of(text)

    monkeypatch.setattr("reranker_service.scoring.texts.digest_of", watched)

    async def scenario() -> None:
        texts = ["short", *("x" * 300_000 + str(number) for number in range(20))]
        table = TextTable(cast(Any, None), Ticket(object(), False), texts[:1])
        await table.digests()
        table.texts.extend(texts[1:])
        first, second = await asyncio.gather(table.digests(), table.digests())
        assert list(first) == list(second) == [digest_of(text) for text in texts]

    asyncio.run(scenario())
    assert len(hashed) == 21  # each text once
    assert all(here == (length < 1000) for length, here in hashed)
