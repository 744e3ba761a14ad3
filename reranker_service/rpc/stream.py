"""Session of one ``RerankStream`` call, which reads, scores and replies at the same time.

A reader takes messages in and starts one task a chunk; replies of finished chunks queue up for the writer. Pairs are in
flight from the moment their chunk has room until gRPC has taken its reply. At the limit of pairs in flight, or where
the server's budget of bytes has no room, the reader stops, and HTTP/2 flow control slows the client. So the server also
stops reading from a client that does not read its replies, and holds a bounded part of that client's work.

While a chunk waits for room, the reader reads one message further, so that a ``cancel`` directly behind the chunk is
obeyed. Any other message waits until the chunk has room.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

from reranker.v1 import reranker_pb2 as pb

from ..observing.metrics import Metrics
from ..scoring import Pairs, Scorer, TableCosts, TextTable, Ticket
from .admission import Admission
from .budget import Account
from .errors import RerankError, as_rerank_error, cancelled, idle, invalid
from .messages import usage_message
from .validation import Validator

# A reply beside its scores: the message and its place in the queue. A status has up to 2,000 characters twice.
_REPLY_BYTES = 2048
_REFUSAL_BYTES = 12 << 10
_SCORE_BYTES = 8  # in an array that grows by doubling
# A chunk's id, which is kept until the stream ends.
_ID_BYTES = 128

# A message may hold millions of ids, and a hundred thousand texts; other calls get their turn between so many of them.
_CANCELS_AT_ONCE = 4096
_TEXTS_AT_ONCE = 4096

Write = Callable[[pb.RerankStreamResponse], Awaitable[object]]


class _Reply(NamedTuple):
    """A reply on its way to the client.

    Attributes:
        message: The reply.
        pairs: Number of pairs in flight that it frees.
        bytes: Number of bytes that it frees.
        known: Time at which its scores were known, ``time.monotonic()`` seconds; ``None`` without scores.
    """

    message: pb.RerankStreamResponse
    pairs: int = 0
    bytes: int = 0
    known: float | None = None


@dataclass(eq=False, slots=True)
class _Chunk:
    """A chunk from its reading to its result.

    Attributes:
        id: The client's id.
        pairs: Its pairs, or the reason why it has none to score.
        held: Bytes that it holds; 0 until it has room.
        reply: Of these, the bytes that its reply goes on to hold.
        task: Admits and scores it.
    """

    id: int
    pairs: Pairs | Exception
    held: int = 0
    reply: int = 0
    task: asyncio.Task[None] | None = None

    @property
    def weight(self) -> int:
        """Pairs in flight that it counts as. A refused chunk counts as one pair until its reply is read."""
        return 1 if isinstance(self.pairs, Exception) else len(self.pairs)


class StreamSession:
    """The state of one stream; ``run`` runs it."""

    def __init__(
        self,
        scorer: Scorer,
        validator: Validator,
        info: pb.GetModelInfoResponse,
        admission: Admission,
        metrics: Metrics,
        thread: Executor | None = None,
    ) -> None:
        self._scorer = scorer
        self._validator = validator
        self._info = info
        self._admission = admission
        self._metrics = metrics
        self._thread = thread  # validates many texts; None: the event loop's default one
        self._replies: asyncio.Queue[_Reply | None] = asyncio.Queue()  # None comes after the last reply
        self._tasks: set[asyncio.Task[None]] = set()
        self._unanswered: dict[int, _Chunk] = {}
        self._in_flight = 0  # pairs
        self._pairs_waiting = 0
        self._scoring = 0  # chunks
        self._room = asyncio.Event()
        self._admitted = asyncio.Event()  # set while no chunk waits for room
        self._admitted.set()
        self._half_closed = False
        self._progress_seconds: float | None = None
        self._failure: RerankError | None = None
        self._reader: asyncio.Task[None] | None = None
        self._moved = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.Task[None] | None = None  # while a write is under way

    async def run(self, requests: AsyncIterator[pb.RerankStreamRequest], write: Write) -> None:
        """Run the stream to its end.

        Args:
            requests: The client's messages.
            write: Sends a message, and returns once gRPC has taken it.

        Raises:
            InvalidRequestError: A message broke the protocol, which ends the stream.
            RerankError: A limit of the server ends the stream.
        """
        with self._admission.stream(lambda: bool(self._in_flight)) as account:
            self._reader = reader = asyncio.create_task(self._read(requests, account))
            reader.add_done_callback(lambda _: self._replies.put_nowait(None))
            self._watch()
            try:
                while (reply := await self._next_reply()) is not None:
                    self._writer = asyncio.current_task()
                    await write(reply.message)
                    self._writer = None
                    if reply.known is not None:
                        self._metrics.sent(time.monotonic() - reply.known)
                    if reply.message.WhichOneof("message") != "progress":
                        self._moved = time.monotonic()
                    account.give(reply.bytes)
                    self._in_flight -= reply.pairs
                    self._room.set()
                if self._failure is not None:
                    raise self._failure
                await reader
            except asyncio.CancelledError:
                if self._failure is None:
                    raise
                # `_watch` cancelled a write that the client does not take. gRPC sends the status behind it.
                if task := asyncio.current_task():
                    task.uncancel()
                raise self._failure from None
            finally:
                self._writer = None
                self._admission.pairs -= self._pairs_waiting
                if self._timer is not None:
                    self._timer.cancel()
                for task in (reader, *self._tasks):
                    task.cancel()
                # Otherwise task, error, traceback and this frame keep each other, and the texts, until the garbage
                # collector looks.
                del reader
                self._reader = self._failure = None

    async def _next_reply(self) -> _Reply | None:
        """The next reply, or a progress message if there is none for as long as the client asked for.

        The writer calls it only while gRPC takes messages, so that progress messages never queue up.
        """
        while True:
            if self._progress_seconds is None or not self._replies.empty():
                return await self._replies.get()
            try:
                async with asyncio.timeout(self._progress_seconds):
                    return await self._replies.get()
            except TimeoutError:
                if not (self._half_closed and not self._unanswered) and self._replies.empty():
                    progress = pb.StreamProgress(
                        pairs_waiting=self._pairs_waiting,
                        pairs_in_server=self._admission.pairs,
                        pairs_finished=self._scorer.finished,
                    )
                    return _Reply(pb.RerankStreamResponse(progress=progress))

    def _watch(self) -> None:
        """End the stream if no message has moved for the limit of idle streams, and nothing is being computed."""
        limit = self._admission.stream_idle_seconds
        if self._scoring:
            self._moved = time.monotonic()
        left = self._moved + limit - time.monotonic()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._watch)
            return
        self._end(idle(limit))
        if self._writer is not None:
            self._writer.cancel()

    def _end(self, error: RerankError) -> None:
        """End the stream with an error, after the replies that are ready."""
        self._failure = self._failure or error
        assert self._reader is not None
        self._reader.cancel()

    async def _read(self, requests: AsyncIterator[pb.RerankStreamRequest], account: Account) -> None:
        """Take in all messages; returns when every chunk has its reply."""
        table: TextTable | None = None
        costs: TableCosts | None = None
        text_bytes = 0
        chunk_ids: set[int] = set()
        try:
            async for request in requests:
                self._moved = time.monotonic()
                kind = request.WhichOneof("message")
                if table is None or costs is None:
                    opening = self._validator.open(request)
                    table = TextTable(opening.options, Ticket(self, opening.interactive))
                    costs = TableCosts(self._scorer.costs, opening.options)
                    self._progress_seconds = opening.progress_seconds
                    opened = pb.StreamOpened(
                        fingerprint=self._info.fingerprint,
                        limits=self._validator.limits.to_message(),
                        preferred_pairs_per_chunk=self._info.preferred_pairs_per_chunk,
                    )
                    self._replies.put_nowait(_Reply(pb.RerankStreamResponse(opened=opened)))
                    continue
                if kind == "cancel":
                    self._validator.cancel(request.cancel)
                    ids = request.cancel.chunk_ids
                    for begin in range(0, len(ids), _CANCELS_AT_ONCE):
                        for chunk_id in ids[begin : begin + _CANCELS_AT_ONCE]:
                            self._cancel(chunk_id, table, costs, account)
                        await asyncio.sleep(0)
                    continue
                await self._admitted.wait()
                if kind == "texts":
                    texts, added = await self._texts(request.texts, len(table.texts), text_bytes)
                    text_bytes += added
                    charged = len(table.texts)
                    table.texts.extend(texts)
                    # The message has a second copy of the texts. The table alone frees them when the stream ends.
                    del request, texts
                    while charged < len(table.texts):
                        cost = costs.add(table.texts[charged : charged + _TEXTS_AT_ONCE])
                        charged += _TEXTS_AT_ONCE
                        await account.take(cost)
                        await asyncio.sleep(0)
                    continue
                if kind == "chunk":
                    await self._admission.turns.take()
                    self._validator.chunk_id(request.chunk.id, chunk_ids)
                    chunk_ids.add(request.chunk.id)
                    self._add(request.chunk, table, costs, account)
                elif kind == "open":
                    raise invalid("open", "came a second time; a stream is opened once, by its first message")
                else:
                    raise invalid("message", "is not set; give texts, a chunk or a cancel")
                # The message would otherwise be held until the next one comes.
                del request
            self._half_closed = True
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            # A chunk that goes on without its texts would end with an internal error.
            for task in self._tasks:
                task.cancel()
            if table is not None:
                table.close()

    async def _texts(self, message: pb.StreamTexts, texts_before: int, bytes_before: int) -> tuple[list[str], int]:
        """Validate texts; many of them on a thread. Raises ``RerankError``."""
        if len(message.texts) <= _TEXTS_AT_ONCE:
            return self._validator.texts(message, texts_before, bytes_before)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._validator.texts, message, texts_before, bytes_before
        )

    def _add(self, message: pb.StreamChunk, table: TextTable, costs: TableCosts, account: Account) -> None:
        """Begin with a chunk that was read."""
        pairs: Pairs | Exception
        try:
            pairs = self._validator.chunk(message, len(table.texts))
        except Exception as error:
            pairs = as_rerank_error(error)
        else:
            self._pairs_waiting += len(pairs)
            self._admission.pairs += len(pairs)
        self._unanswered[message.id] = chunk = _Chunk(message.id, pairs)
        self._begin(chunk, table, costs, account)

    def _begin(self, chunk: _Chunk, table: TextTable, costs: TableCosts, account: Account) -> None:
        self._admitted.clear()
        chunk.task = asyncio.create_task(self._answer(chunk, table, costs, account))
        self._tasks.add(chunk.task)
        chunk.task.add_done_callback(self._tasks.discard)

    def _cancel(self, chunk_id: int, table: TextTable, costs: TableCosts, account: Account) -> None:
        """Give up a chunk; has no effect on a chunk that is unknown or answered."""
        chunk = self._unanswered.get(chunk_id)
        if chunk is None or chunk.task is None:
            return
        chunk.task.cancel()
        if not chunk.held:
            # Its result needs room like any other, so that a client cannot pile up results that it does not read.
            self._forget(chunk)
            chunk.pairs = cancelled()
            self._begin(chunk, table, costs, account)
        else:
            self._refuse(chunk, cancelled())

    async def _admit(self, chunk: _Chunk, costs: TableCosts, account: Account) -> None:
        """Wait until the limit of pairs in flight and the budget of bytes have room for a chunk."""
        # A chunk larger than the limit runs alone.
        while self._in_flight and self._in_flight + chunk.weight > self._validator.limits.max_pairs_in_flight:
            self._room.clear()
            await self._room.wait()
        if isinstance(chunk.pairs, Exception):
            held, kept = _REFUSAL_BYTES, _ID_BYTES
        else:
            held, kept = self._scorer.costs.pairs(len(chunk.pairs)), _ID_BYTES + costs.encoded(chunk.pairs)
        await account.take(held + kept)
        if isinstance(chunk.pairs, Pairs):
            costs.keep(chunk.pairs)
        chunk.held = held
        self._in_flight += chunk.weight
        self._admitted.set()

    async def _answer(self, chunk: _Chunk, table: TextTable, costs: TableCosts, account: Account) -> None:
        """Admit and score a chunk."""
        try:
            await self._admit(chunk, costs, account)
        except RerankError as error:
            self._end(error)
            return
        self._scoring += 1
        try:
            if isinstance(chunk.pairs, Exception):
                raise chunk.pairs
            scored = await self._scorer.score(table, chunk.pairs)
        except Exception as error:
            self._refuse(chunk, as_rerank_error(error))
        else:
            known = time.monotonic()
            self._metrics.reply("RerankStream", scored.usage)
            result = pb.ChunkResult(usage=usage_message(scored.usage))
            result.scores.values.extend(scored.scores.tolist())
            self._reply(chunk, result, _REPLY_BYTES + _SCORE_BYTES * len(scored.scores), known)
        finally:
            self._scoring -= 1
            account.give(chunk.held - chunk.reply)

    def _refuse(self, chunk: _Chunk, error: RerankError) -> None:
        self._metrics.refusal("RerankStream", error.code.name)
        status = error.to_status()
        self._reply(chunk, pb.ChunkResult(error=status), _REPLY_BYTES + 2 * status.ByteSize())

    def _reply(self, chunk: _Chunk, result: pb.ChunkResult, size: int, known: float | None = None) -> None:
        """Queue the one result of a chunk, which takes over ``size`` of the chunk's bytes."""
        result.id = chunk.id
        chunk.reply = min(size, chunk.held)
        del self._unanswered[chunk.id]
        self._forget(chunk)
        self._replies.put_nowait(_Reply(pb.RerankStreamResponse(result=result), chunk.weight, chunk.reply, known))

    def _forget(self, chunk: _Chunk) -> None:
        """Count a chunk's pairs no longer as waiting."""
        if isinstance(chunk.pairs, Pairs):
            self._pairs_waiting -= len(chunk.pairs)
            self._admission.pairs -= len(chunk.pairs)
