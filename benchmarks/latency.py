"""Latency of a small interactive request beside a stream that keeps the engine full, with and without priority."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from grpc import aio

from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.report import Figure
from benchmarks.rounds import Spread
from benchmarks.texts import Grid
from examples.processes import Child
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

_DOCUMENTS = 8
_CHUNK_PAIRS = 128
_DEPTH = 4096
_PROBES = 10
_SEEN_BETWEEN_PROBES = 1


class Saturation:
    """Bulk stream that keeps 4,096 pairs in flight and sends a new chunk for every reply.

    Probes are small chunks on the same stream. The server scores them in the order of arrival, after the pairs that the
    stream sent before.

    Args:
        stub: Stub of the service.
        table: Queries and documents of the stream's pairs.
    """

    def __init__(self, stub: Any, table: Grid) -> None:
        self._stub = stub
        self._table = table
        self._ids = itertools.count()
        self._blocks = itertools.cycle(
            (query, document)
            for query in range(len(table.queries))
            for document in range(0, len(table.documents) - _CHUNK_PAIRS + 1, _CHUNK_PAIRS)
        )
        self._texts = 0
        self._call: Any = None
        self._waiting: dict[int, asyncio.Event] = {}
        self._replies = 0
        self._replied = asyncio.Condition()
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Keep the engine full until the task is cancelled.

        Raises:
            RuntimeError: A chunk failed.
        """
        self._call = self._stub.RerankStream()
        await self._write(pb.RerankStreamRequest(open=pb.StreamOpen(priority=pb.PRIORITY_BULK)))
        await self._send_texts([*self._table.queries, *self._table.documents])
        for _ in range(_DEPTH // _CHUNK_PAIRS):
            await self._send_block()
        await self._call.read()
        try:
            while True:
                message = await self._call.read()
                if message.result.WhichOneof("outcome") != "scores":
                    raise RuntimeError(f"a chunk of the saturating stream failed: {message.result.error}")
                if answered := self._waiting.pop(message.result.id, None):
                    answered.set()
                    continue
                await self._send_block()
                async with self._replied:
                    self._replies += 1
                    self._replied.notify_all()
        finally:
            self._call.cancel()

    async def replies(self, count: int) -> None:
        """Wait until ``count`` more chunks have been answered."""
        async with self._replied:
            enough = self._replies + count
            await self._replied.wait_for(lambda: self._replies >= enough)

    async def probe(self, query: str, documents: tuple[str, ...]) -> float:
        """Send a few pairs as one more chunk of this stream and return the seconds until their reply."""
        began = time.perf_counter()
        first = self._texts
        await self._send_texts([query, *documents])
        grid = pb.PairGrid(query_ids=[first], document_ids=range(first + 1, self._texts))
        chunk = pb.StreamChunk(id=next(self._ids), grid=grid)
        answered = self._waiting[chunk.id] = asyncio.Event()
        await self._write(pb.RerankStreamRequest(chunk=chunk))
        await answered.wait()
        return time.perf_counter() - began

    async def _send_texts(self, texts: list[str]) -> None:
        self._texts += len(texts)
        await self._write(pb.RerankStreamRequest(texts=pb.StreamTexts(texts=texts)))

    async def _send_block(self) -> None:
        query, document = next(self._blocks)
        first = len(self._table.queries) + document
        grid = pb.PairGrid(query_ids=[query], document_ids=range(first, first + _CHUNK_PAIRS))
        await self._write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=next(self._ids), grid=grid)))

    async def _write(self, message: pb.RerankStreamRequest) -> None:
        # gRPC allows one write at a time on a call, and probes and blocks are written by different tasks.
        async with self._writing:
            await self._call.write(message)


def with_torch(bench: Bench) -> list[Figure]:
    """Run ``interactive_latency`` on a server with the tiny model and the torch engine."""
    with bench.launcher.server(bench.models["tiny"], "torch") as server:
        return interactive_latency(bench, server, "torch, tiny")


def interactive_latency(bench: Bench, server: Child, title: str) -> list[Figure]:
    """Measure p95 of ``Rerank`` with 8 documents beside a saturating stream, as a share of p95 without priority.

    "Without priority" means scoring in the order of arrival: the 8 pairs are sent at the end of the saturating stream.
    "Fair share" means a second bulk stream for the 8 pairs, which shares the engine with the saturating one.

    Args:
        bench: The run.
        server: Server with a model that scores about 2,000 pairs a second or more.
        title: First words of the figures' names.
    """
    probes = max(5, int(_PROBES * bench.scale))
    rounds = _runner().run(_measure(bench, address_of(server), probes))
    labels = {
        "alone": "unary, idle server",
        "interactive": "unary beside a stream",
        "fair": "second bulk stream beside a stream",
        "queued": "chunk at the end of the stream",
    }
    for name, label in labels.items():
        bench.say(f"{label}: p95 {1000 * Spread.of([one[name] for one in rounds]).value:,.0f} ms")

    def share(other: str) -> Spread:
        return Spread.of([one["interactive"] / one[other] for one in rounds])

    def milliseconds(name: str) -> Spread:
        return Spread.of([1000 * one[name] for one in rounds])

    name = f"{title}: 8 documents beside a stream, p95"
    return [
        Figure(f"{name}, priority / none", share("queued"), "x", 0.2, False),
        Figure(f"{name}, priority / fair share", share("fair"), "x", None, False),
        Figure(f"{name}, with priority", milliseconds("interactive"), "ms", None, False),
        Figure(f"{name}, idle server", milliseconds("alone"), "ms", None, False),
    ]


@functools.cache
def _runner() -> asyncio.Runner:
    """Return the program's one event loop: with several, gRPC wakes a loop for events of another loop's channels."""
    return asyncio.Runner()


async def _measure(bench: Bench, address: str, probes: int) -> list[dict[str, float]]:
    rounds: list[dict[str, float]] = []
    async with aio.insecure_channel(address) as channel:
        stub: Any = rpc.RerankerServiceStub(channel)

        async def in_turn(once: Callable[[str, tuple[str, ...]], Awaitable[float]], count: int = probes) -> float:
            return _p95([await once(*_pairs(bench)) for _ in range(count)])

        async def interactive(query: str, documents: tuple[str, ...]) -> float:
            began = time.perf_counter()
            await stub.Rerank(pb.RerankRequest(query=query, documents=documents))
            return time.perf_counter() - began

        async def fair(query: str, documents: tuple[str, ...]) -> float:
            return await _own_stream(stub, query, documents)

        for _ in range(bench.rounds):
            alone = await in_turn(interactive)
            saturation = Saturation(stub, bench.corpus.grid(256, 512))
            running = asyncio.create_task(saturation.run())
            try:
                await _unless_failed(running, saturation.replies(_SEEN_BETWEEN_PROBES))
                found = {"alone": alone}
                found["interactive"] = await _unless_failed(running, in_turn(interactive))
                found["fair"] = await _unless_failed(running, in_turn(fair, probes // 2))
                found["queued"] = await _unless_failed(running, _queued(bench, saturation, probes))
            finally:
                running.cancel()
                await asyncio.wait({running})
            rounds.append(found)
    return rounds


async def _queued(bench: Bench, saturation: Saturation, probes: int) -> float:
    """p95 of probes at the end of the stream, in seconds; many are in flight at a time, because each takes long."""
    tasks: list[asyncio.Task[float]] = []
    for _ in range(probes):
        tasks.append(asyncio.create_task(saturation.probe(*_pairs(bench))))
        await saturation.replies(_SEEN_BETWEEN_PROBES)
    return _p95(await asyncio.gather(*tasks))


async def _own_stream(stub: Any, query: str, documents: tuple[str, ...]) -> float:
    grid = pb.PairGrid(query_ids=[0], document_ids=range(1, 1 + len(documents)))
    began = time.perf_counter()
    call = stub.RerankStream()
    for message in (
        pb.RerankStreamRequest(open=pb.StreamOpen(priority=pb.PRIORITY_BULK)),
        pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[query, *documents])),
        pb.RerankStreamRequest(chunk=pb.StreamChunk(grid=grid)),
    ):
        await call.write(message)
    await call.done_writing()
    replies = [reply async for reply in call]
    if len(replies) != 2 or replies[1].result.WhichOneof("outcome") != "scores":
        raise RuntimeError(f"a stream of {_DOCUMENTS} pairs gave no scores: {replies}")
    return time.perf_counter() - began


async def _unless_failed(running: asyncio.Task[None], work: Awaitable[Any]) -> Any:
    """Return the result of ``work``; if the saturating stream fails first, raise its error."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({running, task}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        running.result()
    return await task


def _pairs(bench: Bench) -> tuple[str, tuple[str, ...]]:
    grid = bench.corpus.grid(1, _DOCUMENTS)
    return grid.queries[0], grid.documents


def _p95(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 95))
