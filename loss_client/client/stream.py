"""One bidirectional stream of a job: texts and chunks go out, scores come in.

A stream ends when every chunk is answered, when it has carried as much as the server allows, or when it breaks. The
job's ``Progress`` holds what the next stream has to carry: only chunks without an answer, and their texts again.

A job of a client with one server sends all chunks ahead, and the server's backpressure limits what is in flight. With
several servers, each has a stream of its own, which takes a chunk only while its ``Window`` is open. So does the stream
of the one server behind a host name, because the name may get further addresses.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from grpc import aio
from numpy.typing import NDArray

from loss_client.client.chunks import Chunk
from loss_client.client.columns import Columns
from loss_client.client.endpoints import Endpoint
from loss_client.client.errors import ConnectionLostError, IncompatibleServerError, ScoreError, from_status
from loss_client.client.job import Job
from loss_client.client.patience import Patience
from loss_client.client.streams import Streams
from loss_client.client.texts import TextTable
from loss_client.client.window import Window
from reranker.v1 import reranker_pb2 as pb

_TEXTS_MESSAGE_BYTES = 1 << 20
_MESSAGE_OVERHEAD_BYTES = 1 << 10
_TEXT_OVERHEAD_BYTES = 8
# Time after which a stream without work looks again for late chunks of other streams.
_LOOK_SECONDS = 0.05


async def score_on_stream(
    job: Job, streams: Streams, agree: Callable[[Endpoint, str], None], endpoint: Endpoint, patience: Patience
) -> None:
    """Score over one stream until every chunk is answered, or the stream may carry no more.

    Args:
        job: The job.
        streams: The job's open streams and its part without scores.
        agree: Called with the endpoint and the model that it opened the stream with; raises ``OtherModelError`` if the
            job's scores may not come from that model.
        endpoint: The server.
        patience: Extended by answers and by progress messages.

    Raises:
        OtherModelError: See ``agree``.
        ConnectionLostError, grpc.aio.AioRpcError: The stream broke; others get what was not answered.
        RerankerError: The server refused the stream or a chunk, or its answer is wrong.
    """
    stub = await endpoint.stub(patience.remaining())
    progress = streams.progress
    call = stub.RerankStream(metadata=endpoint.metadata)
    stream = _Stream(job, streams, endpoint, call)
    streams.add(stream)
    broke = False
    try:
        opened = await stream.open(str(endpoint.address), patience.progress_seconds)
        patience.heard()
        agree(endpoint, opened.fingerprint)
        progress.begin_stream(opened.fingerprint)
        broke = True
        if endpoint.reports:
            patience.expect_reports()
        async with _alongside(partial(stream.send, opened, patience), call):
            await stream.receive(patience)
        broke = False
    finally:
        call.cancel()  # no effect on a call that has ended
        if broke:
            progress.stream_broke()
        streams.remove(stream)


class _Stream:
    """The sending and the receiving side of one call. Implements ``Member``.

    Attributes:
        endpoint: The server.
        unanswered: Chunks that were taken from the job's progress and have no answer yet, by their ids on this stream.
        window: Limit of the pairs of these chunks, which counts only if the client has several servers; None before the
            server has opened the stream.
    """

    def __init__(self, job: Job, streams: Streams, endpoint: Endpoint, call: Any) -> None:
        self.unanswered: dict[int, Chunk] = {}
        self.window: Window | None = None
        self._job = job
        self._streams = streams
        self._progress = streams.progress
        self.endpoint = endpoint
        self._call = call
        self._columns = Columns() if job.pairs.grid else None
        self._woken = asyncio.Event()
        self._given_up: set[int] = set()  # ids of chunks whose answer is to be dropped
        self._to_cancel: list[int] = []  # of these, chunks that the server does not know of

    def wake(self) -> None:
        """Let the sending side look for chunks again."""
        self._woken.set()

    def give_up(self, chunk: Chunk) -> None:
        """Drop an unanswered chunk and its later answer; cancel it if the server can do that."""
        chunk_id = next(one for one, mine in self.unanswered.items() if mine == chunk)
        del self.unanswered[chunk_id]
        self._given_up.add(chunk_id)
        if self.endpoint.reports:
            self._to_cancel.append(chunk_id)
        self.wake()

    async def open(self, server: str, progress_seconds: float) -> pb.StreamOpened:
        """Open the stream and return the server's reply.

        Args:
            server: The server's address, for error messages.
            progress_seconds: Longest silence of the server before it sends a progress message; servers of contract 1.0
                send none.
        """
        job = self._job
        first_message = pb.StreamOpen(options=job.options, priority=job.priority, progress_seconds=progress_seconds)
        with suppress(aio.BaseError, asyncio.InvalidStateError):  # the read below raises the reason
            await self._call.write(pb.RerankStreamRequest(open=first_message))
        first = await self._call.read()
        if first is aio.EOF:
            raise ConnectionLostError(f"{server} ended the stream without an answer")
        opened: pb.StreamOpened = first.opened
        limits = opened.limits
        if not min(limits.max_pairs_per_chunk, limits.max_texts_per_stream, limits.max_text_bytes_per_stream):
            raise IncompatibleServerError(f"{server} opened a stream without naming its limits")
        return opened

    async def send(self, opened: pb.StreamOpened, patience: Patience) -> None:
        """Send chunks, each after those of its texts that are not on this stream yet, and half-close the stream.

        Args:
            opened: The server's reply to the opening of the stream.
            patience: Learns when the stream waits for other streams and not for its server.
        """
        job, progress, call, limits = self._job, self._progress, self._call, opened.limits
        table, preferred = job.pairs.table, opened.preferred_pairs_per_chunk
        first = min(job.pairs_per_chunk(preferred), limits.max_pairs_per_chunk)
        # Without progress messages an answer is the only sign of work: large chunks of a slow server would look like a
        # stall.
        grows = self.endpoint.reports
        pairs = min(job.most_pairs_per_chunk(preferred), limits.max_pairs_per_chunk) if grows else first
        self.window = Window(first, limits.max_pairs_in_flight or sys.maxsize, grown_pairs=pairs)
        progress.plan(first, limits, most=pairs)
        self._streams.planned()
        sent_ids = np.full(len(table.texts), -1, dtype=np.int64)  # a text's id on this stream, -1: not sent
        texts_sent = bytes_sent = chunk_id = 0
        most_chunks = limits.max_chunks_per_stream or sys.maxsize  # unset by servers of contract 1.0
        while chunk_id < most_chunks and (chunk := await self._next_chunk(self.window, pairs, patience)) is not None:
            queries, documents = progress.ids(chunk)
            wire_queries, wire_documents = sent_ids[queries], sent_ids[documents]
            new: list[int] = []
            if wire_queries.min() < 0 or wire_documents.min() < 0:
                named = np.concatenate((queries[wire_queries < 0], documents[wire_documents < 0]))
                new = list(dict.fromkeys(named.tolist()))
                size = sum(table.sizes[text] for text in new)
                too_many = texts_sent + len(new) > limits.max_texts_per_stream
                if too_many or bytes_sent + size > limits.max_text_bytes_per_stream:
                    if texts_sent or self._streams.shared(chunk):
                        self._streams.give_back(self, [chunk])
                        break
                    if chunk.pairs > 1:
                        self._streams.give_back(self, chunk.halves())
                        continue
            self.unanswered[chunk_id] = chunk
            if self._streams.parallel:
                self.window.sent(chunk_id, chunk.pairs, _now())
            if new:
                for message in _text_messages(table, new, limits.max_message_bytes):
                    await call.write(message)
                sent_ids[new] = np.arange(texts_sent, texts_sent + len(new))
                texts_sent += len(new)
                bytes_sent += size
                wire_queries, wire_documents = sent_ids[queries], sent_ids[documents]
            await call.write(_chunk_message(chunk_id, job.pairs.grid, wire_queries, wire_documents))
            chunk_id += 1
        await call.done_writing()

    async def _next_chunk(self, window: Window, pairs: int, patience: Patience) -> Chunk | None:
        """Wait for room in the window and for a chunk; return None if there will be none.

        Args:
            window: The window, which counts only if the client has several servers.
            pairs: Most pairs of the chunk.
            patience: Learns when the stream waits for other streams and not for its server.
        """
        progress, streams = self._progress, self._streams
        if not streams.parallel:
            return None if self.endpoint.leaving else progress.next_chunk(pairs)
        try:
            while True:
                if self._to_cancel:
                    ids, self._to_cancel = self._to_cancel, []
                    await self._call.write(pb.RerankStreamRequest(cancel=pb.StreamCancel(chunk_ids=ids)))
                if not progress.pairs_left or self.endpoint.leaving:
                    return None
                if window.open and (room := streams.room(self, window)) > 0:
                    chunk = progress.next_chunk(min(window.chunk_pairs, room), self._columns)
                    if chunk is not None:
                        return chunk
                    if streams.alone():
                        return None
                    if not self.unanswered and (chunk := streams.late_chunk(self, window)) is not None:
                        return chunk
                idle = not self.unanswered
                patience.idle(idle)
                self._woken.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS if idle else None):
                        await self._woken.wait()
        finally:
            patience.idle(False)

    async def receive(self, patience: Patience) -> None:
        """Read answers until the server ends the stream."""
        while True:
            try:
                message = await self._call.read()
            except aio.AioRpcError:
                if self._progress.pairs_left == 0:
                    return  # the stream broke after the job's last answer
                raise
            if message is aio.EOF:
                break
            if message.WhichOneof("message") == "result":
                if message.result.id in self._given_up:
                    self._drop(message.result)
                    patience.heard()
                else:
                    self._accept(message.result)
                    patience.progress()
            elif message.HasField("progress"):
                patience.heard(message.progress)
        if self.unanswered:
            raise ConnectionLostError(f"the server ended the stream with {len(self.unanswered)} chunks unanswered")

    def _accept(self, result: pb.ChunkResult) -> None:
        chunk = self.unanswered.get(result.id)
        if chunk is None:
            raise ScoreError(f"the server answered chunk {result.id}, which is not one that waits for an answer")
        outcome = result.WhichOneof("outcome")
        if outcome != "scores":
            if outcome == "error":
                raise from_status(result.error)
            raise ScoreError(f"the server answered chunk {result.id} with neither scores nor an error")
        scores = np.array(result.scores.values, dtype=np.float32)
        if len(scores) != chunk.pairs:
            raise ScoreError(f"the server answered a chunk of {chunk.pairs} pairs with {len(scores)} scores")
        if not np.isfinite(scores).all():
            raise ScoreError("the server sent a score that is not finite")
        del self.unanswered[result.id]
        self._progress.take(chunk, scores, [result.usage], str(self.endpoint.address))
        self._streams.answered(self, chunk)
        if self._streams.parallel:
            assert self.window is not None  # made before the first chunk was sent
            self.window.answered(result.id, _now())
            self.wake()

    def _drop(self, result: pb.ChunkResult) -> None:
        """Count the answer to a chunk that another stream has answered before."""
        self._given_up.remove(result.id)
        assert self.window is not None  # made before the first chunk was sent
        self.window.answered(result.id, _now(), scored=result.HasField("scores"))
        self.wake()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _text_messages(table: TextTable, new: list[int], most_bytes: int) -> Iterator[pb.RerankStreamRequest]:
    room = min(_TEXTS_MESSAGE_BYTES, most_bytes) - _MESSAGE_OVERHEAD_BYTES
    texts: list[str] = []
    size = 0
    for text in new:
        cost = table.sizes[text] + _TEXT_OVERHEAD_BYTES
        if texts and size + cost > room:
            yield pb.RerankStreamRequest(texts=pb.StreamTexts(texts=texts))
            texts, size = [], 0
        texts.append(table.texts[text])
        size += cost
    yield pb.RerankStreamRequest(texts=pb.StreamTexts(texts=texts))


def _chunk_message(
    chunk_id: int, grid: bool, queries: NDArray[np.int64], documents: NDArray[np.int64]
) -> pb.RerankStreamRequest:
    query_ids, document_ids = queries.tolist(), documents.tolist()
    if grid:
        pairs = pb.PairGrid(query_ids=query_ids, document_ids=document_ids)
        return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=chunk_id, grid=pairs))
    return pb.RerankStreamRequest(
        chunk=pb.StreamChunk(id=chunk_id, list=pb.PairList(query_ids=query_ids, document_ids=document_ids))
    )


@asynccontextmanager
async def _alongside(sending: Callable[[], Awaitable[None]], call: Any) -> AsyncIterator[None]:
    """Run the sending side of a call next to the receiving side, and raise the error of the side that failed first.

    A call that has ended refuses further writes. The sender ignores that, because the receiver raises the reason.
    """

    async def send() -> None:
        try:
            await sending()
        except (aio.AioRpcError, aio.BaseError, asyncio.InvalidStateError):
            return
        except Exception:
            call.cancel()  # wakes the receiver
            raise

    task = asyncio.get_running_loop().create_task(send())
    try:
        yield
    finally:
        if task.done() and not task.cancelled() and task.exception() is not None:
            task.result()
        task.cancel()
        await asyncio.wait({task})
