"""What clients make the server hold stays inside one budget, and no stream waits for room for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.rpc.admission import Admission
from reranker_service.rpc.budget import Budget
from reranker_service.rpc.errors import BusyError

from .servers import ControlledEngine, ServerProcess, serve_in_process
from .test_progress import Unread, opening, rest, results, start
from .test_stream import OPEN, TEXTS, chunk

MEBIBYTE = 1 << 20


def texts(count: int, size: int) -> pb.RerankStreamRequest:
    return pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["x" * size] * count))


def retry_seconds(error: aio.AioRpcError) -> float | None:
    """Delay of the error's ``RetryInfo``; ``None`` without one."""
    status = rpc_status.from_call(error)
    detail = error_details_pb2.RetryInfo()
    if not any(one.Unpack(detail) for one in status.details):
        return None
    return detail.retry_delay.ToMilliseconds() / 1000


def exhausted(error: aio.AioRpcError, flag: str, *, retry: bool = True) -> None:
    """Check an error of a limit of all calls."""
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert flag in error.details()
    assert (retry_seconds(error) is not None) == retry


def all_given_back(admission: Admission) -> None:
    assert (admission.budget.held, admission.pairs, admission.streams) == (0, 0, 0)


async def until(condition: Callable[[], object]) -> None:
    """Return once a condition on the server's books is true."""
    while not condition():  # noqa: ASYNC110 - the books signal no events
        await asyncio.sleep(0.01)


async def failure(call: aio.StreamStreamCall) -> aio.AioRpcError:
    """Read a stream until it fails."""
    try:
        while await call.read() is not aio.EOF:
            pass
    except aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


def test_unary_calls_take_room_or_are_refused() -> None:
    budget = Budget(800)
    with budget.hold(500), budget.hold(300):
        with pytest.raises(BusyError, match="raise --memory-bytes") as caught, budget.hold(1):
            pass
        assert caught.value.retry_seconds is not None
    with pytest.raises(BusyError) as caught, budget.hold(801):
        pass
    assert caught.value.retry_seconds is None
    assert budget.held == 0


def test_streams_wait_for_room_and_the_oldest_that_fits_comes_first() -> None:
    async def scenario() -> list[str]:
        budget = Budget(800)  # 700 for streams
        order: list[str] = []
        accounts = [budget.open(lambda: True) for _ in range(4)]
        await accounts[0].take(650)

        async def take(name: str, number: int, amount: int) -> None:
            await accounts[number].take(amount)
            order.append(name)

        tasks = [asyncio.create_task(take(*each)) for each in (("c", 3, 60), ("b", 2, 690), ("a", 1, 60))]
        await asyncio.sleep(0.01)
        assert order == []
        with budget.hold(150):  # interactive calls have an eighth of their own
            pass
        accounts[0].close()
        await asyncio.wait({tasks[0], tasks[2]})
        assert order == ["a", "c"]
        accounts[1].close()
        tasks[1].cancel()  # it waits for more than there is
        await asyncio.wait(tasks)
        accounts[3].close()
        assert budget.held == 0
        with pytest.raises(BusyError) as caught:
            await accounts[2].take(701)
        assert caught.value.retry_seconds is None
        return order

    asyncio.run(scenario())


def test_the_youngest_stream_with_nothing_in_flight_is_ended() -> None:
    async def scenario() -> None:
        budget = Budget(800, patience=0.3)
        busy, oldest, middle, youngest = (budget.open(flight) for flight in (lambda: True, *(lambda: False,) * 3))
        for account in (busy, oldest, middle, youngest):
            await account.take(150)
        waiting = [asyncio.create_task(one.take(200)) for one in (busy, oldest, middle, youngest)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert done == {waiting[3]}
        with pytest.raises(BusyError, match=r"waited 0.3 s .*--memory-bytes"):
            await waiting[3]
        youngest.close()
        await waiting[0]  # the oldest that waits
        # The busy stream never ends for this reason, and the others wait on; the next youngest is ended.
        done, _ = await asyncio.wait(waiting[1:3], return_when=asyncio.FIRST_COMPLETED)
        assert done == {waiting[2]}
        waiting[2].exception()
        middle.close()
        busy.close()
        await waiting[1]
        oldest.close()
        assert budget.held == 0

    asyncio.run(scenario())


def test_a_stream_that_ends_while_it_waits_for_room_leaves_nothing_held() -> None:
    """The end of a stream cancels its waiting message and closes its account at once, before the message notices."""

    async def scenario() -> tuple[int, int]:
        budget = Budget(800)  # 700 for streams
        accounts = [budget.open(lambda: False) for _ in range(2)]
        for account in accounts:
            await account.take(300)
        waiting = [asyncio.create_task(account.take(350)) for account in accounts]
        await asyncio.sleep(0)
        for task, account in zip(waiting, accounts, strict=True):
            task.cancel()
            account.close()
        await asyncio.wait(waiting)
        held = budget.held
        again = budget.open(lambda: False)
        await again.take(700)  # there is room for all of it
        again.close()
        return held, budget.held

    assert asyncio.run(scenario()) == (0, 0)


def test_a_full_server_refuses_unary_calls_with_a_retry_hint(cross_encoder: Path) -> None:
    async def scenario() -> None:
        admission = Admission(MEBIBYTE)
        async with serve_in_process(cross_encoder, ControlledEngine(), admission=admission) as channel:
            stub = rpc.RerankerServiceStub(channel)
            call = await start(channel, OPEN, texts(1, 850_000))
            await until(lambda: admission.budget.held >= 850_000)
            small = pb.RerankRequest(query="a", documents=["b"])
            large = pb.RerankRequest(query="a", documents=["x" * 100_000])
            assert len((await stub.Rerank(small)).results) == 1
            for answer in (stub.Rerank(large), stub.RerankBatch(pb.RerankBatchRequest(requests=[small, large]))):
                with pytest.raises(aio.AioRpcError) as caught:
                    await answer
                exhausted(caught.value, "--memory-bytes")
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Rerank(pb.RerankRequest(query="a", documents=["x" * 1_000_000]))
            exhausted(caught.value, "--memory-bytes", retry=False)
            assert await rest(call) == []
            assert len((await stub.Rerank(large)).results) == 1
        all_given_back(admission)

    asyncio.run(scenario())


def test_a_stream_without_room_is_slowed_and_finishes(cross_encoder: Path) -> None:
    async def scenario() -> None:
        admission = Admission(MEBIBYTE)
        engine = ControlledEngine(max_in_flight=1000, open_gate=False)
        async with serve_in_process(cross_encoder, engine, admission=admission) as channel:
            call = await start(channel, opening(5), TEXTS, *map(chunk, range(200)))
            await engine.wait_for_sequences(8)
            await asyncio.sleep(0.3)
            assert admission.budget.held <= MEBIBYTE * 7 // 8
            assert sum(map(len, engine.batches)) < 8 * 70
            engine.gate.set()
            found = await results(call, 200)
            assert {one.WhichOneof("outcome") for one in found.values()} == {"scores"}
            assert await rest(call) == []
        all_given_back(admission)

    asyncio.run(scenario())


def test_streams_that_hold_texts_do_not_wait_for_each_other_for_ever(cross_encoder: Path) -> None:
    async def scenario() -> None:
        admission = Admission(MEBIBYTE)
        admission.budget = Budget(MEBIBYTE, patience=0.5)
        async with serve_in_process(cross_encoder, ControlledEngine(), admission=admission) as channel:
            old, young = [await start(channel, OPEN, texts(1, 300_000), texts(1, 300_000)) for _ in range(2)]
            with pytest.raises(aio.AioRpcError) as caught:
                await young.read()
            exhausted(caught.value, "--memory-bytes")
            grid = pb.PairGrid(query_ids=[0], document_ids=[1])
            await old.write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=3, grid=grid)))
            assert (await results(old, 1))[3].HasField("scores")
            assert await rest(old) == []
        all_given_back(admission)

    asyncio.run(scenario())


def test_streams_in_all_are_limited(cross_encoder: Path) -> None:
    async def scenario() -> None:
        admission = Admission(max_streams=2)
        async with serve_in_process(cross_encoder, ControlledEngine(), admission=admission) as channel:
            first, second = [await start(channel, OPEN) for _ in range(2)]
            with pytest.raises(aio.AioRpcError) as caught:
                await start(channel, OPEN)
            exhausted(caught.value, "--max-streams")
            assert await rest(first) == []
            third = await start(channel, OPEN, TEXTS, chunk(0))
            assert (await results(third, 1))[0].HasField("scores")
            for call in (second, third):
                await rest(call)
        all_given_back(admission)

    asyncio.run(scenario())


def test_an_idle_stream_ends_and_a_computing_one_does_not(cross_encoder: Path) -> None:
    async def scenario() -> None:
        engine = ControlledEngine(open_gate=False)
        admission = Admission(stream_idle_seconds=0.4)
        async with serve_in_process(cross_encoder, engine, admission=admission) as channel:
            computing = await start(channel, opening(0.1), TEXTS, chunk(0))
            for call in (await start(channel, OPEN, TEXTS), await start(channel, opening(0.1))):
                error = await failure(call)
                assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                assert "--stream-idle-seconds" in error.details()
            engine.gate.set()
            replies = await rest(computing)
            assert [one.result.id for one in replies if one.HasField("result")] == [0]
        all_given_back(admission)

    asyncio.run(scenario())


def test_a_stream_whose_results_are_not_read_ends(cross_encoder: Path) -> None:
    """A client that never reads: the server's writes block, then nothing moves, and the stream ends."""

    async def scenario() -> None:
        admission = Admission(stream_idle_seconds=0.4)
        engine = ControlledEngine(max_in_flight=1 << 16, max_batch=1 << 15)
        serving = serve_in_process(cross_encoder, engine, admission=admission, cache_bytes=MEBIBYTE)
        async with serving as channel:
            stub = rpc.RerankerServiceStub(channel)
            call = stub.RerankStream()
            for message in (OPEN, TEXTS):
                await call.write(message)
            wide = pb.PairList(query_ids=[0] * 16384, document_ids=[1] * 16384)

            async def write_all() -> None:
                for number in range(1 << 20):
                    await call.write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, list=wide)))

            writer = asyncio.create_task(write_all())
            await until(lambda: admission.streams)
            await until(lambda: not admission.streams)
            await asyncio.sleep(0)
            all_given_back(admission)
            error = await failure(call)
            # This client's own status is INTERNAL if its write fails before it has read the server's status.
            assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)
            await asyncio.wait({writer})
            assert writer.exception() is not None
            assert (await stub.Rerank(pb.RerankRequest(query="a", documents=["b"]))).results

    asyncio.run(scenario())


def test_a_stream_that_breaks_gives_everything_back(cross_encoder: Path) -> None:
    async def scenario() -> None:
        admission = Admission()
        engine = ControlledEngine(open_gate=False)
        async with serve_in_process(cross_encoder, engine, admission=admission) as channel:
            call = await start(channel, OPEN, TEXTS, chunk(0), chunk(1))
            await engine.wait_for_sequences(16)
            call.cancel()
            await until(lambda: not admission.streams)
            broken = await start(channel, OPEN, TEXTS, chunk(0), OPEN)
            with pytest.raises(aio.AioRpcError):
                await rest(broken)
            await until(lambda: not admission.streams)
        all_given_back(admission)

    asyncio.run(scenario())


def test_replies_that_are_not_read_stay_charged(cross_encoder: Path) -> None:
    async def scenario() -> None:
        unread = Unread(cross_encoder)

        async def messages() -> object:
            for message in (OPEN, TEXTS, *map(chunk, range(100))):
                yield message
            await asyncio.Event().wait()

        run = asyncio.create_task(unread.session.run(messages(), unread.write))
        await until(lambda: unread.scorer.finished == 800 and not unread.admission.pairs)
        assert 100 * 2048 < unread.admission.budget.held < 100 * 8192
        await unread.end(run)

    asyncio.run(scenario())


def test_large_metadata_is_refused(cross_encoder_server: ServerProcess) -> None:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        request = pb.RerankRequest(query="a", documents=["b"])
        assert stub.Rerank(request, metadata=(("note", "x" * 6000),)).results
        with pytest.raises(grpc.RpcError) as caught:
            stub.Rerank(request, metadata=(("note", "x" * 9000),))
        assert caught.value.code().value[0] == code_pb2.RESOURCE_EXHAUSTED
        assert stub.Rerank(request).results


def test_64_streams_that_never_read_stay_inside_the_budget(cross_encoder: Path) -> None:
    """The process grows by the budget and what gRPC holds, also when 64 more streams follow."""
    streams, budget, message = 64, 128 * MEBIBYTE, texts(64, 4000)
    # Each call: a message in hand as bytes and as texts, and the window of flow control. 32 MiB: on an idle
    # machine 170 to 176 MiB were measured in all, at a load of 9 once 208; the reason for the difference is not known.
    allowed = budget + streams * (2 * message.ByteSize() + MEBIBYTE // 2) + 32 * MEBIBYTE
    flags = ("--memory-bytes", str(budget), "--engine", "torch", "--threads", "1")
    with ServerProcess("--model", str(cross_encoder), *flags, module="benchmarks.instant") as server:
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        for _ in range(2):
            sent = [0] * streams
            done = threading.Event()

            def requests(number: int, sent: list[int] = sent, done: threading.Event = done) -> Iterator[object]:
                yield OPEN
                for _ in range(200):  # 50 MB
                    sent[number] += 1
                    yield message
                done.wait()

            channels = [
                grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
                for _ in range(streams)
            ]
            calls = [rpc.RerankerServiceStub(one).RerankStream(requests(i)) for i, one in enumerate(channels)]
            seen, still = -1, 0
            while still < 4:  # seconds in which no stream could send
                time.sleep(1)
                still = still + 1 if seen == sum(sent) and seen * message.ByteSize() > budget else 0
                seen = sum(sent)
            assert seen * message.ByteSize() > budget
            assert seen < streams * 200
            growth = process.memory_info().rss - before
            assert growth < allowed, growth / MEBIBYTE
            for call in calls:
                call.cancel()
            done.set()
            for channel in channels:
                channel.close()
        with grpc.insecure_channel(server.address) as channel:
            request = pb.RerankRequest(query="a", documents=["b"])
            assert rpc.RerankerServiceStub(channel).Rerank(request, timeout=60, wait_for_ready=True).results
