"""Streams: backpressure, cancellation and failures, with an engine that waits at a gate of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.engines import EngineDeadError
from reranker_service.rpc.limits import Limits
from reranker_service.rpc.stream import StreamSession
from reranker_service.rpc.turns import Turns
from reranker_service.scheduling import Job, JobResult, Scheduler
from reranker_service.scoring.texts import OncePerText, TextTable

from .servers import ControlledEngine, serve_in_process

OPEN = pb.RerankStreamRequest(open=pb.StreamOpen(options=pb.RerankOptions(score_type=pb.SCORE_TYPE_RAW)))
TEXTS = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["query", *(f"document {i}" for i in range(8))]))


def chunk(number: int, documents: int = 8) -> pb.RerankStreamRequest:
    grid = pb.PairGrid(query_ids=[0], document_ids=range(1, documents + 1))
    return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, grid=grid))


async def send(*messages: pb.RerankStreamRequest) -> AsyncIterator[pb.RerankStreamRequest]:
    for message in messages:
        yield message


def test_a_client_that_does_not_read_is_not_read_from(cross_encoder: Path) -> None:
    """Without reads, the server takes in a bounded number of pairs; once the client reads, it answers all."""

    async def scenario() -> tuple[int, int]:
        engine = ControlledEngine(max_in_flight=1000)
        limits = Limits(max_pairs_in_flight=64)
        async with serve_in_process(cross_encoder, engine, limits) as channel:
            written = 0
            # Large messages, so that flow control stops the client before buffers have taken in all chunks.
            wide = pb.PairList(query_ids=[0] * 64, document_ids=[1] * 64)
            call = rpc.RerankerServiceStub(channel).RerankStream()
            await call.write(OPEN)
            await call.write(TEXTS)

            async def write_all() -> None:
                nonlocal written
                for number in range(4000):
                    await call.write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, list=wide)))
                    written += 1
                await call.done_writing()

            writer = asyncio.create_task(write_all())
            # The writer stops when every buffer on the way is full.
            before = -1
            while written != before:
                before = written
                await asyncio.wait({writer}, timeout=0.5)
            held = sum(map(len, engine.batches)) // 64
            replies = [reply async for reply in call]
            await writer
            return held, len([one for one in replies if one.HasField("result")])

    held, answered = asyncio.run(scenario())
    assert answered == 4000
    assert held < 2000


def test_pairs_in_flight_stay_under_the_limit(cross_encoder: Path) -> None:
    async def scenario() -> int:
        engine = ControlledEngine(max_in_flight=1000, open_gate=False)
        async with serve_in_process(cross_encoder, engine, Limits(max_pairs_in_flight=20)) as channel:
            call = rpc.RerankerServiceStub(channel).RerankStream(send(OPEN, TEXTS, *map(chunk, range(10))))
            await engine.wait_for_sequences(16)
            # Another call is answered, so the server had time to read the stream's third chunk.
            info = await rpc.RerankerServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
            assert info.fingerprint == "f"
            held = sum(map(len, engine.batches))
            engine.gate.set()
            replies = [reply async for reply in call]
            assert len(replies) == 11
            return held

    assert asyncio.run(scenario()) == 16


def test_a_cancelled_stream_withdraws_its_pairs(cross_encoder: Path) -> None:
    async def scenario() -> tuple[int, int]:
        engine = ControlledEngine(max_in_flight=16, max_batch=8, open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            call = stub.RerankStream(send(OPEN, TEXTS, *map(chunk, range(20))))
            await engine.wait_for_sequences(16)
            call.cancel()
            # This pair enters the engine only if the stream's pairs are withdrawn.
            other = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a", documents=["b"])))
            await engine.wait_for_sequences(17)
            engine.gate.set()
            await other
            return engine.cancelled, sum(map(len, engine.batches))

    assert asyncio.run(scenario()) == (16, 17)


def test_a_cancelled_call_withdraws_its_pairs(cross_encoder: Path) -> None:
    async def scenario() -> int:
        engine = ControlledEngine(max_in_flight=2, max_batch=2, open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            call = stub.Rerank(pb.RerankRequest(query="a", documents=["b"] * 100))
            await engine.wait_for_sequences(2)
            call.cancel()
            other = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a", documents=["b"])))
            await engine.wait_for_sequences(3)
            engine.gate.set()
            await other
            return engine.cancelled

    assert asyncio.run(scenario()) == 2


def test_a_deadline_ends_the_servers_work(cross_encoder: Path) -> None:
    async def scenario() -> int:
        engine = ControlledEngine(max_in_flight=2, max_batch=2, open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            seconds = 0.5
            while not engine.batches:  # on a slow machine the call may need longer to reach the engine
                with pytest.raises(aio.AioRpcError) as caught:
                    await stub.Rerank(pb.RerankRequest(query="a", documents=["b"] * 100), timeout=seconds)
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                seconds *= 4
            other = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a", documents=["b"])))
            await engine.wait_for_sequences(3)
            engine.gate.set()
            await other
            return engine.cancelled

    assert asyncio.run(scenario()) == 2


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (EngineDeadError("killed"), grpc.StatusCode.UNAVAILABLE, "the engine has died: EngineDeadError"),
        (ValueError("odd"), grpc.StatusCode.INTERNAL, "scoring failed: ValueError"),
    ],
)
def test_an_engines_failure_reaches_every_client(
    cross_encoder: Path, failure: Exception, code: grpc.StatusCode, words: str
) -> None:
    async def scenario() -> tuple[aio.AioRpcError, pb.ChunkResult, pb.RerankBatchItem]:
        engine = ControlledEngine()
        engine.failure = failure
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            request = pb.RerankRequest(query="a", documents=["b"])
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Rerank(request)
            batch = await stub.RerankBatch(pb.RerankBatchRequest(requests=[request]))
            replies = [reply async for reply in stub.RerankStream(send(OPEN, TEXTS, chunk(1)))]
            return caught.value, replies[1].result, batch.items[0]

    error, result, item = asyncio.run(scenario())
    message = error.details()
    assert error.code() == code
    assert message.startswith(f"{words}; the server's log has the details under id ")
    assert (result.error.code, result.error.message) == (code.value[0], message)
    assert (item.error.code, item.error.message) == (code.value[0], message)


def test_a_score_that_is_not_finite_never_leaves_the_server(cross_encoder: Path) -> None:
    class BrokenEngine(ControlledEngine):
        async def run(self, sequences: object, urgent: bool = False) -> np.ndarray:
            scores = await super().run(sequences, urgent)
            scores[0] = np.nan
            return scores

    async def scenario() -> tuple[aio.AioRpcError, pb.ChunkResult]:
        async with serve_in_process(cross_encoder, BrokenEngine()) as channel:
            stub = rpc.RerankerServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Rerank(pb.RerankRequest(query="a", documents=["b"]))
            replies = [reply async for reply in stub.RerankStream(send(OPEN, TEXTS, chunk(1)))]
            return caught.value, replies[1].result

    error, result = asyncio.run(scenario())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "not finite" in error.details()
    assert not result.HasField("scores")


def test_an_over_long_text_fails_its_own_chunk_only(bi_encoder: Path) -> None:
    class Embedder(ControlledEngine):
        async def run(self, sequences: object, urgent: bool = False) -> np.ndarray:
            lengths = await super().run(sequences, urgent)
            return np.stack([np.ones_like(lengths), np.zeros_like(lengths)], axis=1)

    def grid(number: int, documents: list[int]) -> pb.RerankStreamRequest:
        pairs = pb.PairGrid(query_ids=[0], document_ids=documents)
        return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, grid=pairs))

    async def scenario() -> dict[int, pb.ChunkResult]:
        async with serve_in_process(bi_encoder, Embedder()) as channel:
            stub = rpc.RerankerServiceStub(channel)
            options = pb.RerankOptions(over_long=pb.OVER_LONG_REJECT, max_length=8)
            opened = pb.RerankStreamRequest(open=pb.StreamOpen(options=options))
            texts = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["a query", "short", "word " * 100]))
            replies = [
                reply
                async for reply in stub.RerankStream(send(opened, texts, grid(1, [1, 2]), grid(2, [1]), grid(3, [2])))
            ]
            return {reply.result.id: reply.result for reply in replies[1:]}

    results = asyncio.run(scenario())
    assert {number: result.WhichOneof("outcome") for number, result in results.items()} == {
        1: "error",
        2: "scores",
        3: "error",
    }
    assert results[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "1 texts are too long; the first is text 2" in results[1].error.message


def test_each_text_of_a_stream_is_encoded_once(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reranker_service.models.cross_encoder import CrossEncoderLayout

    encoded: list[str] = []
    for name in ("encode_queries", "encode_documents"):
        original = getattr(CrossEncoderLayout, name)

        def counting(self: CrossEncoderLayout, texts: list[str], *rest: object, original: object = original) -> object:
            encoded.extend(texts)
            return original(self, texts, *rest)

        monkeypatch.setattr(CrossEncoderLayout, name, counting)

    async def scenario() -> None:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            call = rpc.RerankerServiceStub(channel).RerankStream(send(OPEN, TEXTS, *map(chunk, range(20))))
            assert len([reply async for reply in call]) == 21

    asyncio.run(scenario())
    assert sorted(encoded) == sorted(TEXTS.texts.texts)


def test_each_text_is_embedded_once(bi_encoder: Path) -> None:
    class Embedder(ControlledEngine):
        async def run(self, sequences: object, urgent: bool = False) -> np.ndarray:
            await super().run(sequences, urgent)
            return np.tile(np.float32([0.6, 0.8]), (len(sequences), 1))

    async def scenario() -> int:
        engine = Embedder()
        async with serve_in_process(bi_encoder, engine) as channel:
            call = rpc.RerankerServiceStub(channel).RerankStream(send(OPEN, TEXTS, *map(chunk, range(20))))
            replies = [reply async for reply in call]
        assert all(one.result.scores.values == [1.0] * 8 for one in replies[1:])
        return sum(map(len, engine.batches))

    assert asyncio.run(scenario()) == 9


@pytest.mark.parametrize(("priority", "first"), [(pb.PRIORITY_UNSPECIFIED, 16), (pb.PRIORITY_BULK, 1)])
def test_a_bulk_batch_is_overtaken(
    cross_encoder: Path, priority: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ranking that comes after a bulk batch enters the engine before the rest of that batch."""

    async def scenario() -> list[int]:
        engine = ControlledEngine(max_in_flight=16, max_batch=16, open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            request = pb.RerankRequest(query="a", documents=["b"] * 32)
            batch = asyncio.ensure_future(
                stub.RerankBatch(pb.RerankBatchRequest(requests=[request], priority=priority))
            )
            await engine.wait_for_sequences(16)
            arrived = asyncio.Event()
            run = Scheduler.run

            async def noted(self: Scheduler, job: Job) -> JobResult:
                arrived.set()
                return await run(self, job)

            monkeypatch.setattr(Scheduler, "run", noted)
            ranking = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a", documents=["b"])))
            await arrived.wait()
            engine.gate.set()
            await asyncio.gather(batch, ranking)
            return [len(one) for one in engine.batches]

    assert asyncio.run(scenario())[1] == first


def test_a_stream_that_breaks_while_a_chunk_is_encoded_gives_no_internal_error(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are dropped in the moment in which the chunk's token ids are there, and before the chunk takes them."""
    encoded, dropped = asyncio.Event(), asyncio.Event()
    original_get, original_close = OncePerText.get, TextTable.close

    async def get(self: OncePerText, ids: np.ndarray, compute: Any) -> list[Any]:
        await original_get(self, ids, compute)
        encoded.set()
        await dropped.wait()
        return [self._values[one] for one in ids.tolist()]

    def close(self: TextTable) -> None:
        original_close(self)
        dropped.set()

    monkeypatch.setattr(OncePerText, "get", get)
    monkeypatch.setattr(TextTable, "close", close)

    async def scenario() -> list[pb.RerankStreamResponse]:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            call = rpc.RerankerServiceStub(channel).RerankStream()
            for message in (OPEN, TEXTS, chunk(1)):
                await call.write(message)
            await encoded.wait()
            await call.write(OPEN)
            replies: list[pb.RerankStreamResponse] = []
            with contextlib.suppress(aio.AioRpcError):
                while (reply := await call.read()) is not aio.EOF:
                    replies.append(reply)
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        return replies

    replies = asyncio.run(scenario())
    assert [one.WhichOneof("message") for one in replies] == ["opened"]


def test_streams_handle_one_chunk_in_each_pass_of_the_event_loop(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC accepts one call in every second pass: a pass with a chunk of each stream would hold up new calls."""
    original = StreamSession._add
    begun: list[int] = []
    passes = 0

    def add(*arguments: Any) -> None:
        begun.append(passes)
        original(*arguments)

    monkeypatch.setattr(StreamSession, "_add", add)

    async def scenario() -> None:
        nonlocal passes
        async with serve_in_process(cross_encoder, ControlledEngine(max_in_flight=1000)) as channel:
            stub = rpc.RerankerServiceStub(channel)

            async def stream() -> int:
                return len([one async for one in stub.RerankStream(send(OPEN, TEXTS, *map(chunk, range(20))))])

            streams = asyncio.gather(*(stream() for _ in range(16)))
            while not streams.done():
                passes += 1
                await asyncio.sleep(0)
            assert await streams == [21] * 16

    asyncio.run(scenario())
    assert len(begun) == 320
    # The count changes in the middle of a pass, so that it is the same for parts of two passes.
    assert max(Counter(begun).values()) <= 2


def test_turns_are_given_in_order_and_pass_over_those_who_left() -> None:
    async def scenario() -> str:
        turns, order = Turns(), []

        async def work(name: str) -> None:
            await turns.take()
            order.append(name)

        for _ in range(2):
            tasks = {name: asyncio.create_task(work(name)) for name in "abcd"}
            await asyncio.sleep(0)
            tasks["c"].cancel()
            await asyncio.wait(tasks.values())
        return "".join(order)

    assert asyncio.run(scenario()) == "abdabd"
