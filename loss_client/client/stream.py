"""One scoring job on bidirectional streams: texts and chunks go out, scores come in, what is lost goes out again.

A job is a grid or a list of pairs over a table of texts. It runs on one stream at a time. A stream that breaks is
followed by another one that carries the texts again, and only the chunks that had no answer. A stream that
has carried as much as the server allows is finished and followed by another one, too.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from grpc import aio
from numpy.typing import NDArray

from loss_client.client.batch import score_in_batches
from loss_client.client.channels import Channels, Patience, is_unimplemented
from loss_client.client.chunks import Chunk, TextTable, grid_chunks, list_chunks, panel_shape
from loss_client.client.endpoints import Endpoint
from loss_client.client.errors import (
    ClientClosedError,
    ConnectionLostError,
    IncompatibleServerError,
    ModelChangedError,
    RerankerError,
    ScoreError,
    from_status,
)
from loss_client.client.memory import ScoreMemory, digests
from loss_client.client.scores import ScoreMatrix
from reranker.v1 import reranker_pb2 as pb

_TEXTS_MESSAGE_BYTES = 1 << 20
_MESSAGE_OVERHEAD_BYTES = 1 << 10


@dataclass(slots=True)
class Job:
    """What is to be scored, and where the scores go.

    Attributes:
        table: The distinct texts.
        queries: Text ids. Of a grid: one a stored row of the matrix. Of a list: one a pair.
        documents: Text ids. Of a grid: one a stored column. Of a list: one a pair.
        grid: Whether every query is paired with every document; else they are paired one by one, and each pair is a
            row of the matrix, which has one column.
        matrix: Takes the scores.
        options: How pairs are scored.
        priority: What the server is told of the job's urgency.
        chunk_pairs: Most pairs of a chunk.
        timeout: Seconds without a score after which the job fails.
        memory: Scores of pairs that this client has seen; of a list only.
        recurring: Whether the pairs are remembered before others.
    """

    table: TextTable
    queries: NDArray[np.int64]
    documents: NDArray[np.int64]
    grid: bool
    matrix: ScoreMatrix
    options: pb.RerankOptions
    priority: pb.Priority.ValueType
    chunk_pairs: int
    timeout: float
    memory: ScoreMemory
    recurring: bool
    _rows: NDArray[np.intp] | None = None  # of a list: the matrix' row of each pair; None: in order
    _digests: list[bytes] | None = None

    @property
    def pairs(self) -> int:
        """How many scores the job has to ask for."""
        return len(self.queries) * (len(self.documents) if self.grid else 1)

    def ids(self, chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the text ids of a chunk's queries and documents."""
        queries = self.queries[chunk.row_begin : chunk.row_end]
        if self.grid:
            return queries, self.documents[chunk.column_begin : chunk.column_end]
        return queries, self.documents[chunk.row_begin : chunk.row_end]

    def recall(self, fingerprint: str) -> None:
        """Take the scores that are known from earlier out of what has to be asked for; of a list only.

        Args:
            fingerprint: The model that would be asked.
        """
        scope = fingerprint.encode() + b"\0" + self.options.SerializeToString(deterministic=True)
        self._digests = digests(scope, self.table.texts)
        known = self.memory.get(self._keys(self.queries, self.documents), self.recurring)
        missing = np.isnan(known)
        rows = np.flatnonzero(~missing)
        if len(rows):
            # Before the scores: who waits for the last of them may read the counts next.
            self.matrix.usage.pairs += len(rows)
            self.matrix.usage.remembered_pairs += len(rows)
            self.matrix.put(rows, slice(0, 1), known[rows, None])
            self._rows = np.flatnonzero(missing)
            self.queries, self.documents = self.queries[missing], self.documents[missing]

    def take(self, chunk: Chunk, scores: NDArray[np.float32]) -> None:
        """Take in a chunk's scores, shape ``(chunk.pairs,)``."""
        rows = slice(chunk.row_begin, chunk.row_end)
        columns = slice(chunk.column_begin, chunk.column_end)
        block = scores.reshape(chunk.row_end - chunk.row_begin, chunk.column_end - chunk.column_begin)
        if self._digests is not None:
            # First: who waits for the last of the scores may ask for them again at once.
            self.memory.put(self._keys(*self.ids(chunk)), scores, self.recurring)
        self.matrix.put(rows if self._rows is None else self._rows[rows], columns, block)

    def _keys(self, queries: NDArray[np.int64], documents: NDArray[np.int64]) -> Iterator[bytes]:
        assert self._digests is not None
        known = self._digests
        pairs = zip(queries.tolist(), documents.tolist(), strict=True)
        return (known[query] + known[document] for query, document in pairs)


async def run_job(job: Job, channels: Channels) -> None:
    """Score a job. Its matrix gets every score, or the error that ended the job."""
    runner = _JobRunner(job)
    try:
        patience = Patience(job.timeout)
        while runner.pairs_left:
            try:
                await channels.run(runner.stream, patience, runner.describe_left)
            except RerankerError as error:
                if not is_unimplemented(error):
                    raise
                await score_in_batches(job, runner.chunks_left(job.chunk_pairs), channels, patience)
                return
    except asyncio.CancelledError:
        # A job that its caller cancelled has told its matrix so before.
        job.matrix.fail(ClientClosedError("the client was closed before these scores arrived"))
        raise
    except Exception as error:  # whatever it is, those who wait for scores have to learn of it
        job.matrix.fail(error)


class _JobRunner:
    """What a job has still to do, from stream to stream."""

    def __init__(self, job: Job) -> None:
        self.pairs_left = job.pairs
        self._job = job
        self._plan: Iterator[Chunk] | None = None  # chunks that never went out
        self._returned: deque[Chunk] = deque()  # chunks that went out and have to go out again
        self._unanswered: dict[int, Chunk] = {}  # chunks of the present stream, by id
        self._next_id = 0
        self._fingerprint: str | None = None
        self._broken = False

    def describe_left(self) -> str:
        """Say what is done and what is not, for an error message."""
        return (
            f"; {self._job.pairs - self.pairs_left} of {self._job.pairs} pairs are scored, {self.pairs_left} are left"
        )

    def chunks_left(self, pairs: int) -> Iterator[Chunk]:
        """Take the chunks without an answer, each cut to at most ``pairs``."""
        if self._plan is None:
            self._plan = self._cut(pairs, None)
        while (chunk := self._take(pairs)) is not None:
            yield chunk

    async def stream(self, endpoint: Endpoint, patience: Patience) -> None:
        """Score over one stream until every chunk is answered, or the stream may carry no more."""
        stub = await endpoint.stub(patience.remaining())
        call = stub.RerankStream(metadata=endpoint.metadata)
        try:
            opened = await self._open(call, endpoint)
            self._broken = True  # until it has ended well
            async with _alongside(self._send(call, opened.limits), call):
                await self._receive(call, patience)
            self._broken = False
        finally:
            call.cancel()  # no effect on one that has ended
            self._returned.extendleft(reversed(self._unanswered.values()))
            self._unanswered.clear()

    async def _open(self, call: Any, endpoint: Endpoint) -> pb.StreamOpened:
        job = self._job
        with suppress(aio.BaseError, asyncio.InvalidStateError):  # a call that has ended says why when it is read
            await call.write(pb.RerankStreamRequest(open=pb.StreamOpen(options=job.options, priority=job.priority)))
        first = await call.read()
        if first is aio.EOF:
            raise ConnectionLostError(f"{endpoint.target} ended the stream without an answer")
        opened: pb.StreamOpened = first.opened
        if self._fingerprint not in (None, opened.fingerprint):
            raise ModelChangedError(
                f"the job began with the model {self._fingerprint} and would go on at {endpoint.target} with "
                f"{opened.fingerprint}: let every server of a client serve the same model"
            )
        limits = opened.limits
        if self._fingerprint is None and job.memory.keeps and not job.grid:
            job.recall(opened.fingerprint)
            self.pairs_left = job.pairs
        if not min(limits.max_pairs_per_chunk, limits.max_texts_per_stream, limits.max_text_bytes_per_stream):
            raise IncompatibleServerError(f"{endpoint.target} opened a stream without saying what its limits are")
        self._fingerprint = opened.fingerprint
        job.matrix.usage.reconnects += self._broken
        return opened

    async def _send(self, call: Any, limits: pb.Limits) -> None:
        """Send chunks, each after the texts that it is the first to name, and close this side of the stream."""
        job = self._job
        pairs = min(job.chunk_pairs, limits.max_pairs_per_chunk)
        if self._plan is None:
            self._plan = self._cut(pairs, limits)
        sent_ids = np.full(len(job.table.texts), -1, dtype=np.int64)  # a text's id on this stream, -1: not sent
        texts_sent = bytes_sent = chunks_sent = 0
        most_chunks = limits.max_chunks_per_stream or sys.maxsize  # servers of contract 1.0 may not name it
        while chunks_sent < most_chunks and (chunk := self._take(pairs)) is not None:
            chunk_id = self._next_id
            self._next_id += 1
            self._unanswered[chunk_id] = chunk
            queries, documents = job.ids(chunk)
            wire_queries, wire_documents = sent_ids[queries], sent_ids[documents]
            if wire_queries.min() < 0 or wire_documents.min() < 0:
                named = np.concatenate((queries[wire_queries < 0], documents[wire_documents < 0]))
                new = list(dict.fromkeys(named.tolist()))
                size = sum(job.table.sizes[text] for text in new)
                too_many = texts_sent + len(new) > limits.max_texts_per_stream
                if too_many or bytes_sent + size > limits.max_text_bytes_per_stream:
                    if texts_sent:
                        self._returned.appendleft(self._unanswered.pop(chunk_id))
                        break
                    if chunk.pairs > 1:
                        self._returned.extendleft(reversed(self._unanswered.pop(chunk_id).halves()))
                        continue
                for message in _text_messages(job.table, new, limits.max_message_bytes):
                    await call.write(message)
                sent_ids[new] = np.arange(texts_sent, texts_sent + len(new))
                texts_sent += len(new)
                bytes_sent += size
                wire_queries, wire_documents = sent_ids[queries], sent_ids[documents]
            await call.write(_chunk_message(chunk_id, job.grid, wire_queries, wire_documents))
            chunks_sent += 1
        await call.done_writing()

    async def _receive(self, call: Any, patience: Patience) -> None:
        while True:
            try:
                message = await call.read()
            except aio.AioRpcError:
                if self.pairs_left == 0:
                    return  # nothing was lost
                raise
            if message is aio.EOF:
                break
            self._accept(message.result)
            patience.progress()
        if self._unanswered:
            raise ConnectionLostError(f"the server ended the stream with {len(self._unanswered)} chunks unanswered")

    def _accept(self, result: pb.ChunkResult) -> None:
        chunk = self._unanswered.get(result.id)
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
        del self._unanswered[result.id]
        # Before the scores: who waits for the last of them may read the counts next.
        self._job.matrix.usage.add(result.usage)
        self._job.take(chunk, scores)
        self.pairs_left -= len(scores)

    def _take(self, pairs: int) -> Chunk | None:
        if self._returned:
            chunk = self._returned.popleft()
        else:
            assert self._plan is not None  # made before the first chunk is taken
            planned = next(self._plan, None)
            if planned is None:
                return None
            chunk = planned
        while chunk.pairs > pairs:  # another server may have narrower limits
            chunk, rest = chunk.halves()
            self._returned.appendleft(rest)
        return chunk

    def _cut(self, pairs: int, limits: pb.Limits | None) -> Iterator[Chunk]:
        job = self._job
        if not job.grid:
            return list_chunks(len(job.queries), pairs)
        panel = None
        if limits is not None:
            sizes = np.asarray(job.table.sizes, dtype=np.int64)
            most_texts, most_bytes = limits.max_texts_per_stream, limits.max_text_bytes_per_stream
            panel = panel_shape(sizes[job.queries], sizes[job.documents], most_texts, most_bytes)
        return grid_chunks(len(job.queries), len(job.documents), pairs, panel)


def _text_messages(table: TextTable, new: list[int], most_bytes: int) -> Iterator[pb.RerankStreamRequest]:
    room = min(_TEXTS_MESSAGE_BYTES, most_bytes) - _MESSAGE_OVERHEAD_BYTES
    texts: list[str] = []
    size = 0
    for text in new:
        cost = table.sizes[text] + 8
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
async def _alongside(sending: Any, call: Any) -> AsyncIterator[None]:
    """Run the sending side of a call next to the receiving side; what broke first is what is raised.

    A call that ends refuses what is still being written. That is no error of the sender: the receiver learns why.
    """

    async def send() -> None:
        try:
            await sending
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
