"""Load: many clients with mixed RPCs beside idle streams, half-sent messages and clients that never read.

The server's memory stays inside the budget and a constant, and when the clients have gone nothing of theirs is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpc import StatusCode, aio

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from .. import http2
from .target import HEALTH_SECONDS, MEMORY_BYTES, MIB, TEXTS, Target

FLAGS = ("--max-streams", "4096")
"""Flags of the server."""
CONSTANT = 128 * MIB
"""Growth of the server beyond the budget, at most: what gRPC and Python take up for 1,200 calls on 100 connections."""
FLAT = 24 * MIB
"""Growth from the first quarter of the time to the end, at most."""
FILES_LEFT = 8
"""Open file descriptors that may be left: metrics connections, and sockets that are being closed."""
_CALL_SECONDS = 60
_STREAMS_A_CONNECTION = 250
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
_OPEN = pb.RerankStreamRequest(open=pb.StreamOpen())
_TEXTS = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=TEXTS))


@dataclass
class Report:
    """What was measured.

    Attributes:
        calls: Number of calls of the mixed clients, by RPC and status.
        pairs: Number of scores that were compared with the right ones.
        growth: Bytes by which the memory grew at its peak.
        drift: Bytes by which it grew from the first quarter of the time to the end.
        slowest: Longest time of a health check.
        files: Open file descriptors before and after.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    pairs: int = 0
    growth: int = 0
    drift: int = 0
    slowest: float = 0.0
    files: tuple[int, int] = (0, 0)


def run(
    target: Target,
    *,
    seconds: float,
    clients: int = 64,
    idle: int = 1000,
    half_sent: int = 64,
    unread: int = 16,
    seed: int = 1,
    health: float = HEALTH_SECONDS,
) -> Report:
    """Run the load.

    Args:
        target: The server.
        seconds: How long the mixed clients go on. The clients that never read leave after half of it.
        clients: Number of mixed clients, each with a connection of its own.
        idle: Number of open streams on which nothing moves.
        half_sent: Number of calls whose message is never complete.
        unread: Number of streams whose client never reads; every second one sends one-pair chunks.
        seed: Seed of the clients.
        health: Longest time that a health check may take.

    Raises:
        AssertionError: A score was wrong, a call ended with an improper status, or memory, calls, bytes or open files
            were left.
    """
    target.check_scores()
    target.settle()
    report = Report()
    files = target.open_files()
    with target.watched() as watch:
        asyncio.run(_load(target, report, seconds, clients, idle, half_sent, unread, seed))
    watch.check(MEMORY_BYTES + CONSTANT, health)
    target.settle()
    target.check_scores()
    deadline = time.monotonic() + 20
    while target.open_files() > files + FILES_LEFT and time.monotonic() < deadline:
        time.sleep(0.1)
    report.growth, report.slowest = watch.growth, watch.slowest
    report.files = files, target.open_files()
    assert report.files[1] <= files + FILES_LEFT, f"open files: {report.files}"
    assert report.drift < FLAT, f"the memory grew by {report.drift / MIB:.0f} MiB under a steady load"
    return report


async def _load(
    target: Target, report: Report, seconds: float, clients: int, idle: int, half_sent: int, unread: int, seed: int
) -> None:
    async with contextlib.AsyncExitStack() as stack:

        async def channel() -> aio.Channel:
            return await stack.enter_async_context(aio.insecure_channel(target.address, _OPTIONS))

        waiting = []
        for begin in range(0, idle, _STREAMS_A_CONNECTION):
            connection = await channel()
            waiting += [_idle(connection) for _ in range(min(_STREAMS_A_CONNECTION, idle - begin))]
        calls = await asyncio.gather(*waiting)
        halves = [stack.enter_context(_half_sent(target.address, number)) for number in range(half_sent)]
        never = [asyncio.create_task(_never_read(await channel(), bool(place % 2))) for place in range(unread)]
        end = time.monotonic() + seconds
        works = [
            asyncio.create_task(_work(target, await channel(), report, random.Random(f"{seed} {place}"), end))
            for place in range(clients)
        ]
        await asyncio.sleep(seconds / 4)
        early = target.resident()
        await asyncio.sleep(seconds / 4)
        for task in never:
            task.cancel()
        await asyncio.gather(*never, return_exceptions=True)
        await asyncio.gather(*works)
        report.drift = target.resident() - early
        assert all(not call.done() for call in calls), "an idle stream has ended"
        for call in calls:
            call.cancel()
        del halves


async def _idle(channel: aio.Channel) -> aio.StreamStreamCall:
    call = rpc.RerankerServiceStub(channel).RerankStream()
    await call.write(_OPEN)
    assert (await call.read()).HasField("opened")
    return call


def _half_sent(address: str, number: int) -> contextlib.closing:
    """A call whose message promises 8 MiB and sends a part of it."""
    connection = http2.connect(address)
    method = b"/reranker.v1.RerankerService/" + (b"Rerank", b"RerankBatch", b"RerankStream")[number % 3]
    part = bytes([0]) + (8 * MIB).to_bytes(4, "big") + bytes(16000)
    connection.sendall(http2.call_headers(1, method) + http2.frame(0, 0, 1, part))
    return contextlib.closing(connection)


async def _never_read(channel: aio.Channel, single: bool) -> None:
    """Send chunks, of one pair each or of many, for as long as the server takes them, and read no result."""
    call = rpc.RerankerServiceStub(channel).RerankStream()
    ids = [0] if single else [place % len(TEXTS) for place in range(4096)]
    try:
        await call.write(_OPEN)
        await call.write(_TEXTS)
        for number in range(1 << 20):
            pairs = pb.PairList(query_ids=ids, document_ids=ids)
            await call.write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, list=pairs)))
    finally:
        call.cancel()


async def _work(target: Target, channel: aio.Channel, report: Report, draw: random.Random, end: float) -> None:
    """Make one call after the other until a time, and check each."""
    stub = rpc.RerankerServiceStub(channel)
    makers = {"Rerank": _rerank, "RerankBatch": _batch, "RerankStream": _stream, "GetModelInfo": _info}
    while time.monotonic() < end:
        name = draw.choice(tuple(makers))
        leaves = draw.random() < 0.1
        call = asyncio.ensure_future(makers[name](target, stub, draw))
        try:
            if leaves:
                await asyncio.wait({call}, timeout=draw.random() * 0.02)
                call.cancel()
            pairs = await call
            report.pairs += pairs
            report.calls[name, "OK"] += 1
        except asyncio.CancelledError:
            assert leaves
            report.calls[name, "CANCELLED"] += 1
        except aio.AioRpcError as error:
            # The budget is full of what the clients hold that never read.
            if error.code() != StatusCode.RESOURCE_EXHAUSTED or "--memory-bytes" not in (error.details() or ""):
                raise
            report.calls[name, error.code().name] += 1
            await asyncio.sleep(0.1)


async def _rerank(target: Target, stub: rpc.RerankerServiceStub, draw: random.Random) -> int:
    request = _request(draw)
    reply = await stub.Rerank(request, timeout=_CALL_SECONDS)
    assert target.is_right(request, reply)
    return len(request.documents)


async def _batch(target: Target, stub: rpc.RerankerServiceStub, draw: random.Random) -> int:
    requests = [_request(draw) for _ in range(draw.randint(1, 8))]
    reply = await stub.RerankBatch(pb.RerankBatchRequest(requests=requests), timeout=_CALL_SECONDS)
    for request, item in zip(requests, reply.items, strict=True):
        assert target.is_right(request, item.response)
    return sum(len(request.documents) for request in requests)


async def _stream(target: Target, stub: rpc.RerankerServiceStub, draw: random.Random) -> int:
    texts = draw.sample(TEXTS, 12)
    chunks = {
        number: (draw.sample(range(12), draw.randint(1, 6)), draw.sample(range(12), draw.randint(1, 12)))
        for number in range(draw.randint(1, 8))
    }
    messages = [
        _OPEN,
        pb.RerankStreamRequest(texts=pb.StreamTexts(texts=texts)),
        *(
            pb.RerankStreamRequest(
                chunk=pb.StreamChunk(id=number, grid=pb.PairGrid(query_ids=queries, document_ids=documents))
            )
            for number, (queries, documents) in chunks.items()
        ),
    ]
    replies = [reply async for reply in stub.RerankStream(iter(messages), timeout=_CALL_SECONDS)]
    assert sorted(one.result.id for one in replies[1:]) == list(chunks)
    count = 0
    for one in replies[1:]:
        queries, documents = chunks[one.result.id]
        pairs = [(texts[query], texts[document]) for query in queries for document in documents]
        assert target.are_right(pairs, one.result.scores.values)
        count += len(pairs)
    return count


async def _info(target: Target, stub: rpc.RerankerServiceStub, draw: random.Random) -> int:
    assert (await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_CALL_SECONDS)).fingerprint
    return 0


def _request(draw: random.Random) -> pb.RerankRequest:
    documents: Sequence[str] = draw.choices(TEXTS, k=draw.randint(1, 24))
    return pb.RerankRequest(query=draw.choice(TEXTS), documents=documents, top_n=draw.choice((None, 3)))
