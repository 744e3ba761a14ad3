"""Session of one ``RerankStream`` call, which reads, scores and replies at the same time.

A reader takes messages in and starts one task a chunk; replies of finished chunks queue up for the writer. Pairs are in
flight from the reading of their chunk until gRPC has taken its reply. At the limit of pairs in flight the reader stops,
and HTTP/2 flow control slows the client. So the server also stops reading from a client that does not read its replies,
and holds a bounded part of that client's work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from reranker.v1 import reranker_pb2 as pb

from ..observing.metrics import Metrics
from ..scoring import Pairs, Scorer, TextTable, Ticket
from .errors import as_rerank_error, invalid
from .messages import usage_message
from .validation import Validator


class _Reply(NamedTuple):
    """A reply on its way to the client.

    Attributes:
        message: The reply.
        pairs: Number of pairs in flight that it frees.
        known: Time at which its scores were known, ``time.monotonic()`` seconds; ``None`` without scores.
    """

    message: pb.RerankStreamResponse
    pairs: int = 0
    known: float | None = None


class StreamSession:
    """The state of one stream; ``replies`` runs it."""

    def __init__(self, scorer: Scorer, validator: Validator, info: pb.GetModelInfoResponse, metrics: Metrics) -> None:
        self._scorer = scorer
        self._validator = validator
        self._info = info
        self._metrics = metrics
        self._replies: asyncio.Queue[_Reply | None] = asyncio.Queue()  # None comes after the last reply
        self._chunks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._room = asyncio.Event()

    async def replies(self, requests: AsyncIterator[pb.RerankStreamRequest]) -> AsyncIterator[pb.RerankStreamResponse]:
        """Run the stream to its end.

        Raises:
            InvalidRequestError: A message broke the protocol, which ends the stream.
        """
        reader = asyncio.create_task(self._read(requests))
        reader.add_done_callback(lambda _: self._replies.put_nowait(None))
        try:
            while (reply := await self._replies.get()) is not None:
                yield reply.message
                if reply.known is not None:
                    self._metrics.sent(time.monotonic() - reply.known)
                self._in_flight -= reply.pairs
                self._room.set()
            await reader
        finally:
            reader.cancel()
            for chunk in self._chunks:
                chunk.cancel()

    async def _read(self, requests: AsyncIterator[pb.RerankStreamRequest]) -> None:
        """Take in all messages; returns when every chunk has its reply."""
        table: TextTable | None = None
        text_bytes = 0
        chunk_ids: set[int] = set()
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if table is None:
                    options, interactive = self._validator.open(request)
                    table = TextTable(options, Ticket(self, interactive))
                    opened = pb.StreamOpened(
                        fingerprint=self._info.fingerprint,
                        limits=self._validator.limits.to_message(),
                        preferred_pairs_per_chunk=self._info.preferred_pairs_per_chunk,
                    )
                    self._replies.put_nowait(_Reply(pb.RerankStreamResponse(opened=opened)))
                elif kind == "texts":
                    text_bytes += self._validator.texts(request.texts, len(table.texts), text_bytes)
                    table.texts.extend(request.texts.texts)
                elif kind == "chunk":
                    self._validator.chunk_id(request.chunk.id, chunk_ids)
                    chunk_ids.add(request.chunk.id)
                    await self._start(table, request.chunk)
                elif kind == "open":
                    raise invalid("open", "came a second time; a stream is opened once, by its first message")
                else:
                    raise invalid("message", "is not set; give texts or a chunk")
            await asyncio.gather(*self._chunks)
        finally:
            if table is not None:
                table.close()

    async def _start(self, table: TextTable, chunk: pb.StreamChunk) -> None:
        """Begin to score a chunk as soon as the limit of pairs in flight allows it."""
        pairs: Pairs | Exception
        try:
            pairs = self._validator.chunk(chunk, len(table.texts))
        except Exception as error:
            pairs = as_rerank_error(error)
        # A refused chunk counts as one pair until its reply is read. A chunk larger than the limit runs alone.
        weight = 1 if isinstance(pairs, Exception) else len(pairs)
        while self._in_flight and self._in_flight + weight > self._validator.limits.max_pairs_in_flight:
            self._room.clear()
            await self._room.wait()
        self._in_flight += weight
        task = asyncio.create_task(self._answer(table, chunk.id, pairs, weight))
        self._chunks.add(task)
        task.add_done_callback(self._chunks.discard)

    async def _answer(self, table: TextTable, chunk_id: int, pairs: Pairs | Exception, weight: int) -> None:
        result = pb.ChunkResult(id=chunk_id)
        known: float | None = None
        try:
            if isinstance(pairs, Exception):
                raise pairs
            scored = await self._scorer.score(table, pairs)
        except Exception as error:
            refusal = as_rerank_error(error)
            self._metrics.refusal("RerankStream", refusal.code.name)
            result.error.CopyFrom(refusal.to_status())
        else:
            known = time.monotonic()
            self._metrics.reply("RerankStream", scored.usage)
            result.scores.values.extend(scored.scores.tolist())
            result.usage.CopyFrom(usage_message(scored.usage))
        self._replies.put_nowait(_Reply(pb.RerankStreamResponse(result=result), weight, known))
