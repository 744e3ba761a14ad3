"""Load on a server: streams that keep pairs in flight, and rankings one after the other, with their times."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from .access import Access
from .texts import NewTexts

GRID_SIDE = 64
"""Queries and documents of a grid: each text is in 64 pairs, and each grid has new texts."""
_MESSAGE_BYTES = 1 << 20
_FEWEST_CALLS = 5
FEWEST_RESULTS = 3
"""Results that a measurement of streams waits for."""
_CALL_SECONDS = 120.0


class LoadError(RuntimeError):
    """The server failed a call or a chunk; the message has its status."""


@dataclass(slots=True)
class Meter:
    """Pairs of streams, counted as their results arrive.

    Attributes:
        pairs: Pairs of all results.
        cached: Of these, pairs that the server took from its cache, or that shared another pair's score.
        truncated: Of these, pairs that were truncated to the length limit.
        tokens: Tokens that the model read.
        results: Results.
        later_pairs: Pairs of all results after the first.
        first: Time of the first result, on the clock of ``time.perf_counter``.
        last: Time of the last result.
        began: Time at which the first chunk was sent.
        enough: Set after ``FEWEST_RESULTS`` results.
    """

    pairs: int = 0
    cached: int = 0
    truncated: int = 0
    tokens: int = 0
    results: int = 0
    later_pairs: int = 0
    first: float = 0.0
    last: float = 0.0
    began: float = 0.0
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, result: pb.ChunkResult) -> None:
        """Count the result of a chunk.

        Raises:
            LoadError: The chunk failed.
        """
        if result.WhichOneof("outcome") != "scores":
            raise LoadError(f"a chunk failed with status {result.error.code}: {result.error.message}")
        self.last = time.perf_counter()
        if self.results == 0:
            self.first = self.last
        else:
            self.later_pairs += result.usage.pairs
        self.results += 1
        self.pairs += result.usage.pairs
        self.cached += result.usage.cached_pairs + result.usage.shared_pairs
        self.truncated += result.usage.truncated_pairs
        self.tokens += result.usage.tokens
        if self.results >= FEWEST_RESULTS:
            self.enough.set()

    @property
    def rate(self) -> float:
        """Pairs a second from the first result to the last one, so that the start of a stream does not count."""
        if self.last > self.first:
            return self.later_pairs / (self.last - self.first)
        return self.pairs / max(self.last - self.began, 1e-9)


class Load:
    """A server under load.

    Args:
        channel: Channel to the server.
        access: Token of the calls.
        texts: Texts of the pairs.
        max_length: Longest input in tokens. None: the server's default.
    """

    def __init__(self, channel: aio.Channel, access: Access, texts: NewTexts, max_length: int | None) -> None:
        self._stub: rpc.RerankerServiceAsyncStub = rpc.RerankerServiceStub(channel)
        self._metadata = access.metadata
        self._texts = texts
        self._options = pb.RerankOptions(max_length=max_length)

    async def info(self, timeout: float) -> pb.GetModelInfoResponse:
        """Ask for the model and the limits.

        Args:
            timeout: Most seconds to wait.

        Raises:
            LoadError: The server did not answer.
        """
        try:
            return await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise _failure(error) from error

    async def rank(self, documents: int, seconds: float) -> list[float]:
        """Call ``Rerank`` with new texts, one call after the other; return the seconds of each call.

        Args:
            documents: Documents of a call.
            seconds: Time for the calls; five are made at least.

        Raises:
            LoadError: A call failed.
        """
        found: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(found) < _FEWEST_CALLS:
            request = pb.RerankRequest(
                query=self._texts.queries(1)[0], documents=self._texts.documents(documents), options=self._options
            )
            began = time.perf_counter()
            try:
                await self._stub.Rerank(request, timeout=_CALL_SECONDS, metadata=self._metadata)
            except aio.AioRpcError as error:
                raise _failure(error) from error
            found.append(time.perf_counter() - began)
        return found

    async def stream(self, meter: Meter, info: pb.GetModelInfoResponse, chunk_pairs: int, in_flight: int) -> None:
        """Keep pairs in flight on one stream after another, until the task is cancelled.

        Args:
            meter: Counts the results.
            info: The server's limits.
            chunk_pairs: Most pairs of a chunk.
            in_flight: Most pairs that are sent and not answered.

        Raises:
            LoadError: A stream or a chunk failed.
        """
        try:
            while True:
                call = self._stub.RerankStream(metadata=self._metadata)
                await _Stream(call, meter, in_flight).run(self._messages(info.limits, chunk_pairs))
        except aio.AioRpcError as error:
            raise _failure(error) from error

    def _messages(self, limits: pb.Limits, chunk_pairs: int) -> Iterator[pb.RerankStreamRequest]:
        """Yield the messages of one stream: the opening, then texts and chunks until a limit of the stream is near."""
        yield pb.RerankStreamRequest(open=pb.StreamOpen(options=self._options, priority=pb.PRIORITY_BULK))
        ids = itertools.count()
        side = max(1, min(GRID_SIDE, limits.max_texts_per_stream // 2))
        width = min(side, chunk_pairs)
        height = max(1, chunk_pairs // width)
        first, size, chunks = 0, 0, 0
        while True:
            texts = [*self._texts.queries(side), *self._texts.documents(side)]
            size += sum(len(text.encode()) for text in texts)
            chunks += -(-side // height) * -(-side // width)
            too_much = (
                first + len(texts) > limits.max_texts_per_stream
                or size > limits.max_text_bytes_per_stream
                or chunks > limits.max_chunks_per_stream
            )
            if too_much and first:
                return
            yield from (pb.RerankStreamRequest(texts=pb.StreamTexts(texts=part)) for part in _parts(texts))
            for row in range(0, side, height):
                for column in range(0, side, width):
                    queries = range(first + row, first + min(row + height, side))
                    documents = range(first + side + column, first + side + min(column + width, side))
                    grid = pb.PairGrid(query_ids=queries, document_ids=documents)
                    yield pb.RerankStreamRequest(chunk=pb.StreamChunk(id=next(ids), grid=grid))
            first += len(texts)


class _Stream:
    """One stream: a sender that keeps to the window, and a reader."""

    def __init__(self, call: Any, meter: Meter, window: int) -> None:
        self._call, self._meter, self._window = call, meter, window
        self._in_flight: dict[int, int] = {}  # pairs of each chunk without a result, by id
        self._pairs = 0
        self._room = asyncio.Event()

    async def run(self, messages: Iterator[pb.RerankStreamRequest]) -> None:
        sender = asyncio.create_task(self._send(messages))
        try:
            async for reply in self._call:
                if reply.WhichOneof("message") == "result":
                    self._meter.add(reply.result)
                    self._pairs -= self._in_flight.pop(reply.result.id)
                    self._room.set()
            await sender
        finally:
            sender.cancel()
            self._call.cancel()

    async def _send(self, messages: Iterator[pb.RerankStreamRequest]) -> None:
        for message in messages:
            if message.WhichOneof("message") == "chunk":
                grid = message.chunk.grid
                pairs = len(grid.query_ids) * len(grid.document_ids)
                while self._pairs and self._pairs + pairs > self._window:
                    self._room.clear()
                    await self._room.wait()
                self._pairs += pairs
                self._in_flight[message.chunk.id] = pairs
                self._meter.began = self._meter.began or time.perf_counter()
            await self._call.write(message)
        await self._call.done_writing()


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """Split texts into messages of a mebibyte, or of one text that is larger."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text.encode()) > _MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text.encode())
    yield part


def _failure(error: aio.AioRpcError) -> LoadError:
    hint = {
        grpc.StatusCode.UNAUTHENTICATED: " (give --token-file)",
        grpc.StatusCode.UNAVAILABLE: " (is it a server, and does it use TLS? then give --tls-ca, or grpcs:// before "
        "the address)",
        grpc.StatusCode.UNIMPLEMENTED: " (the server is no reranker service)",
    }.get(error.code(), "")
    return LoadError(f"{error.code().name}: {error.details()}{hint}")
