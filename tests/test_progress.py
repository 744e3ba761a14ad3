"""Contract 1.1 on streams: progress messages, and chunks that the client gives up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from google.rpc import code_pb2
from grpc import aio

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.models import make_layout, read_model
from reranker_service.observing.metrics import Metrics
from reranker_service.rpc.admission import Admission
from reranker_service.rpc.limits import Limits
from reranker_service.rpc.stream import StreamSession
from reranker_service.rpc.validation import Validator
from reranker_service.scheduling import Scheduler
from reranker_service.scoring import Scorer

from .servers import ControlledEngine, serve_in_process, violations
from .test_stream import OPEN, TEXTS, chunk

WAIT_SECONDS = 60.0


def opening(progress_seconds: float) -> pb.RerankStreamRequest:
    return pb.RerankStreamRequest(open=pb.StreamOpen(progress_seconds=progress_seconds))


def cancel(*ids: int) -> pb.RerankStreamRequest:
    return pb.RerankStreamRequest(cancel=pb.StreamCancel(chunk_ids=ids))


def kinds(replies: list[pb.RerankStreamResponse]) -> set[str | None]:
    return {reply.WhichOneof("message") for reply in replies}


async def start(channel: aio.Channel, *messages: pb.RerankStreamRequest) -> aio.StreamStreamCall:
    """Open a stream, send messages, and read ``opened``."""
    call = rpc.RerankerServiceStub(channel).RerankStream()
    for message in messages:
        await call.write(message)
    assert (await call.read()).HasField("opened")
    return call


async def rest(call: aio.StreamStreamCall) -> list[pb.RerankStreamResponse]:
    """Half-close a stream and read to its end."""
    await call.done_writing()
    replies = []
    while (reply := await call.read()) is not aio.EOF:
        replies.append(reply)
    return replies


async def results(call: aio.StreamStreamCall, count: int) -> dict[int, pb.ChunkResult]:
    found = {}
    while len(found) < count:
        reply = await call.read()
        assert reply.result.id not in found
        found[reply.result.id] = reply.result
    return found


def test_a_stream_that_waits_gets_progress(cross_encoder: Path) -> None:
    async def scenario() -> None:
        engine = ControlledEngine(open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            other = asyncio.ensure_future(
                rpc.RerankerServiceStub(channel).Rerank(pb.RerankRequest(query="a", documents=["b"] * 5))
            )
            call = await start(channel, opening(0.1), TEXTS, chunk(0), chunk(1))
            await engine.wait_for_sequences(21)
            for _ in range(3):
                progress = (await call.read()).progress
            assert (progress.pairs_waiting, progress.pairs_in_server, progress.pairs_finished) == (16, 21, 0)
            engine.gate.set()
            assert len((await other).results) == 5
            assert set(await results(call, 2)) == {0, 1}
            # An open stream without pairs gets signs of life as well: its client may be sending texts.
            progress = (await call.read()).progress
            assert (progress.pairs_waiting, progress.pairs_in_server, progress.pairs_finished) == (0, 0, 21)
            assert kinds(await rest(call)) <= {"progress"}

    asyncio.run(asyncio.wait_for(scenario(), WAIT_SECONDS))


def test_progress_counts_pairs_before_their_chunk_is_done(cross_encoder: Path) -> None:
    class Steps(ControlledEngine):
        async def run(self, sequences: object, urgent: bool = False) -> np.ndarray:
            scores = await super().run(sequences, urgent)
            self.gate.clear()  # one batch at a time
            return scores

    async def scenario() -> None:
        engine = Steps(max_in_flight=2, max_batch=2, open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            call = await start(channel, opening(0.1), TEXTS, chunk(0))
            for finished in (0, 2, 4, 6):
                await engine.wait_for_sequences(finished + 2)
                while (progress := (await call.read()).progress).pairs_finished < finished:
                    pass
                assert (progress.pairs_finished, progress.pairs_waiting) == (finished, 8)
                engine.gate.set()
            while not (reply := await call.read()).HasField("result"):
                pass
            assert len(reply.result.scores.values) == 8
            assert kinds(await rest(call)) <= {"progress"}

    asyncio.run(scenario())


def test_a_stream_that_asks_for_no_progress_gets_none(cross_encoder: Path) -> None:
    async def scenario() -> set[str | None]:
        engine = ControlledEngine(open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            call = await start(channel, OPEN, TEXTS, chunk(0))
            await engine.wait_for_sequences(8)
            await asyncio.sleep(0.3)
            engine.gate.set()
            return kinds(await rest(call))

    assert asyncio.run(scenario()) == {"result"}


@pytest.mark.parametrize("seconds", [0, 0.05, -1, math.nan, math.inf])
def test_an_unusable_progress_interval_is_refused(cross_encoder: Path, seconds: float) -> None:
    async def scenario() -> None:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await rest(await start(channel, opening(seconds)))
            assert set(violations(caught.value)) == {"open.progress_seconds"}

    asyncio.run(scenario())


class Unread:
    """A session on a stream whose writer is blocked until ``read`` is set.

    Attributes:
        written: Messages that were given to the writer.
    """

    def __init__(self, model: Path, limits: Limits | None = None) -> None:
        spec = read_model(str(model))
        self.scorer = Scorer(spec, make_layout(spec), Scheduler(ControlledEngine()))
        self.admission = Admission()
        self.session = StreamSession(
            self.scorer,
            Validator(limits or Limits(), self.scorer.ranges),
            pb.GetModelInfoResponse(),
            self.admission,
            Metrics(),
        )
        self.read = asyncio.Event()
        self.written: list[tuple[float, pb.RerankStreamResponse]] = []

    async def write(self, message: pb.RerankStreamResponse) -> None:
        self.written.append((time.monotonic(), message))
        await self.read.wait()

    async def end(self, run: asyncio.Task[None]) -> None:
        run.cancel()
        await asyncio.wait({run})
        await asyncio.sleep(0)
        self.scorer.close()
        assert (self.admission.budget.held, self.admission.pairs, self.admission.streams) == (0, 0, 0)


def test_no_progress_is_queued_behind_a_blocked_writer(cross_encoder: Path) -> None:
    async def scenario() -> None:
        unread = Unread(cross_encoder)

        async def messages() -> AsyncIterator[pb.RerankStreamRequest]:
            yield opening(0.1)
            await asyncio.Event().wait()

        run = asyncio.create_task(unread.session.run(messages(), unread.write))
        await asyncio.sleep(0.5)
        assert [one.WhichOneof("message") for _, one in unread.written] == ["opened"]
        unread.read.set()
        released = time.monotonic()
        await asyncio.sleep(0.5)
        assert unread.written[1][0] >= released + 0.1
        assert unread.written[2][0] >= unread.written[1][0] + 0.1
        await unread.end(run)

    asyncio.run(scenario())


def test_a_cancelled_chunk_leaves_the_queue(cross_encoder: Path) -> None:
    async def scenario() -> None:
        engine = ControlledEngine(max_in_flight=8, open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            call = await start(channel, OPEN, TEXTS, chunk(0))
            await engine.wait_for_sequences(8)
            for number in (1, 2):
                await call.write(chunk(number))
            # The second one has no effect; nor do unknown chunks.
            await call.write(cancel(1, 99))
            await call.write(cancel(1))
            found = await results(call, 1)
            assert found[1].error.code == code_pb2.CANCELLED
            engine.gate.set()
            found = await results(call, 2)
            assert {number: one.WhichOneof("outcome") for number, one in found.items()} == {0: "scores", 2: "scores"}
            await call.write(cancel(0, 1, 2))  # all are answered
            assert await rest(call) == []
        assert sum(map(len, engine.batches)) == 16

    asyncio.run(scenario())


def test_a_chunk_in_the_engine_is_cancelled(cross_encoder: Path) -> None:
    async def scenario() -> None:
        engine = ControlledEngine(open_gate=False)
        async with serve_in_process(cross_encoder, engine) as channel:
            call = await start(channel, opening(5), TEXTS, chunk(0))
            await engine.wait_for_sequences(8)
            await call.write(cancel(0))
            (reply,) = await rest(call)
            assert (reply.result.id, reply.result.error.code) == (0, code_pb2.CANCELLED)
            assert engine.cancelled == 8

    asyncio.run(scenario())


def test_a_chunk_that_waits_for_room_is_cancelled(cross_encoder: Path) -> None:
    async def scenario() -> None:
        engine = ControlledEngine(open_gate=False)
        async with serve_in_process(cross_encoder, engine, Limits(max_pairs_in_flight=8)) as channel:
            call = await start(channel, OPEN, TEXTS, chunk(0), chunk(1), cancel(1), chunk(2))
            await engine.wait_for_sequences(8)
            engine.gate.set()
            found = {one.result.id: one.result for one in await rest(call)}
            assert {number: one.WhichOneof("outcome") for number, one in found.items()} == {
                0: "scores",
                1: "error",
                2: "scores",
            }
            assert found[1].error.code == code_pb2.CANCELLED
        assert sum(map(len, engine.batches)) == 16

    asyncio.run(scenario())


def test_a_cancel_without_chunks_ends_the_stream(cross_encoder: Path) -> None:
    async def scenario() -> None:
        async with serve_in_process(cross_encoder, ControlledEngine()) as channel:
            call = await start(channel, OPEN, cancel())
            with pytest.raises(aio.AioRpcError) as caught:
                await rest(call)
            assert set(violations(caught.value)) == {"cancel.chunk_ids"}

    asyncio.run(scenario())


def test_results_of_cancelled_chunks_do_not_pile_up(cross_encoder: Path) -> None:
    """A client that cancels each chunk and reads nothing is no longer read from at the limit of pairs in flight."""

    async def scenario() -> None:
        unread = Unread(cross_encoder, Limits(max_pairs_in_flight=8))
        taken = 0

        async def messages() -> AsyncIterator[pb.RerankStreamRequest]:
            nonlocal taken
            for message in (OPEN, TEXTS):
                yield message
            for number in range(1000):
                taken = number
                yield chunk(number)
                yield cancel(number)

        run = asyncio.create_task(unread.session.run(messages(), unread.write))
        await asyncio.sleep(0.5)
        assert taken < 12
        unread.read.set()
        await run
        ids = [one.result.id for _, one in unread.written if one.HasField("result")]
        assert sorted(ids) == list(range(1000))
        await unread.end(run)

    asyncio.run(scenario())
