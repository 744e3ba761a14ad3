"""StubServer: a server without a model, for tests of clients.

Its scores are a known function of the texts, it records every request, and a script can make it fail.

    with StubServer() as server, RerankerClient(server.target) as client:
        assert np.array_equal(client.score_grid(queries, documents), hash_scores(queries, documents))
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from numpy.typing import NDArray

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc

T = TypeVar("T")
WAIT_SECONDS = 30.0

_hash = lru_cache(maxsize=None)(lambda text: zlib.crc32(text.encode()))


def hash_scores(
    queries: Sequence[str], documents: Sequence[str], options: pb.RerankOptions | None = None
) -> NDArray[np.float32]:
    """Compute scores that depend on both texts, their roles, the instruction and the length limit; shape (Q, D).

    Probabilities are multiples of 1/10007 in [0, 1); a raw score is 20 times that, less 10.
    """
    options = options or pb.RerankOptions()
    seed = _hash(options.instruction) + 3 * options.max_length
    left = np.array([_hash(text) for text in queries], dtype=np.int64)[:, None]
    right = np.array([_hash(text) for text in documents], dtype=np.int64)[None, :]
    scores = ((31 * left + 7 * right + seed) % 10007) / np.float64(10007)
    if options.score_type == pb.SCORE_TYPE_RAW:
        scores = 20 * scores - 10
    return scores.astype(np.float32)


def numbered_texts(name: str, count: int) -> list[str]:
    return [f"{name} {position} ü" for position in range(count)]


ScoreFunction = Callable[[Sequence[str], Sequence[str], pb.RerankOptions], NDArray[np.float32]]


class Gate:
    """A one-time event that any thread opens and coroutines of any loop wait for."""

    def __init__(self) -> None:
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()

    def open(self) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    async def wait(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self._opened))


class Abort(Exception):
    """Raised by a script: ends the call with this status."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        violations: Sequence[tuple[str, str]] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(code, message)
        self.status = status_of(code, message, violations, retry_seconds)
        self.code = code


def status_of(
    code: grpc.StatusCode,
    message: str,
    violations: Sequence[tuple[str, str]] = (),
    retry_seconds: float | None = None,
) -> status_pb2.Status:
    """Return a google.rpc.Status, with (field, description) pairs as its google.rpc.BadRequest and with RetryInfo."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if retry_seconds is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMicroseconds(round(retry_seconds * 1e6))
        status.details.add().Pack(info)
    if violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=name, description=rule) for name, rule in violations
        ]
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.BadRequest(field_violations=fields))
        status.details.append(packed)
    return status


@dataclass
class ReceivedChunk:
    """A chunk as it was received, and the texts that it names."""

    number: int  # position among the chunks of its stream
    message: pb.StreamChunk
    queries: list[str]
    documents: list[str]

    @property
    def grid(self) -> bool:
        return self.message.WhichOneof("pairs") == "grid"

    def pairs(self) -> list[tuple[str, str]]:
        if self.grid:
            return list(itertools.product(self.queries, self.documents))
        return list(zip(self.queries, self.documents, strict=True))


@dataclass
class ReceivedStream:
    """The messages of one stream, and its end."""

    number: int  # position among the streams of its server
    metadata: dict[str, str | bytes]
    open: pb.StreamOpen = field(default_factory=pb.StreamOpen)
    texts: list[str] = field(default_factory=list)
    text_messages: list[int] = field(default_factory=list)  # bytes of each
    chunks: list[ReceivedChunk] = field(default_factory=list)
    half_closed: bool = False
    cancelled: bool = False  # by the client, while it waited for replies
    ended: bool = False
    answered: list[int] = field(default_factory=list)  # numbers of chunks, in order of reply
    given_up: list[int] = field(default_factory=list)  # ids of chunks that the client cancelled

    def pairs(self) -> list[tuple[str, str]]:
        return [pair for chunk in self.chunks for pair in chunk.pairs()]


ChunkScript = Callable[[ReceivedStream, ReceivedChunk], Awaitable[pb.ChunkResult | None]]
UnaryScript = Callable[[Any], Awaitable[Any]]


def default_limits() -> pb.Limits:
    return pb.Limits(
        max_text_bytes=1 << 20,
        max_documents_per_request=1000,
        max_requests_per_batch=100,
        max_pairs_per_batch=10_000,
        max_pairs_per_chunk=1 << 14,
        max_pairs_in_flight=1 << 17,
        max_texts_per_stream=1 << 17,
        max_text_bytes_per_stream=1 << 28,
        max_message_bytes=4 << 20,
        max_chunks_per_stream=1 << 20,
    )


class StubServer:
    """A gRPC server on a loopback port, in a thread of this process.

    Args:
        score: Returns the scores of queries x documents.
        on_chunk: Awaited for each chunk, in a task of its own. It may wait, raise ``Abort``, return another result
            (without an id), or return None for the right result. Without it chunks are answered in order, at once.
        on_request: The same for unary requests.
        limits: The limits that the server reports; it does not enforce them.
        fingerprint: The model's fingerprint.
        contract: Major and minor version of the contract. From 1.1 on, streams get progress messages that ask for them,
            and unary replies have the fingerprint.
        preferred_pairs: Pairs of a chunk that the server prefers, 0 for no preference.
        without: Names of RPCs that answer UNIMPLEMENTED.
        port: The port; 0 for a free one. ``start`` after ``stop`` uses the same port again.
        host: The address to listen on.
        credentials: Credentials for TLS.
    """

    def __init__(
        self,
        score: ScoreFunction = hash_scores,
        *,
        on_chunk: ChunkScript | None = None,
        on_request: UnaryScript | None = None,
        limits: pb.Limits | None = None,
        fingerprint: str = "stub",
        contract: tuple[int, int] = (1, 0),
        preferred_pairs: int = 0,
        without: frozenset[str] | set[str] = frozenset(),
        port: int = 0,
        host: str = "127.0.0.1",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.score = score
        self.on_chunk = on_chunk
        self.on_request = on_request
        self.limits = limits or default_limits()
        self.fingerprint = fingerprint
        self.contract = contract
        self.preferred_pairs = preferred_pairs
        self.on_info: Callable[[], Awaitable[None]] | None = None  # awaited before each answer of GetModelInfo
        self.on_open: Callable[[ReceivedStream], Awaitable[None]] | None = None  # awaited before a stream is opened
        self.finished = 0  # pairs, reported in progress messages
        self.ahead = 0  # pairs of other calls, reported in progress messages
        self.silent = False  # sends no progress
        self.next_fingerprints: list[str] = []  # in place of ``fingerprint``, for the next streams
        self.without = without
        self.port = port
        self.host = host
        self.streams: list[ReceivedStream] = []
        self.requests: list[Any] = []  # unary requests but GetModelInfo
        self._credentials = credentials
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stub-server", daemon=True)
        self._server: aio.Server | None = None

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_SECONDS)
        self._loop.close()

    def start(self) -> None:
        """Listen on the port, also again after ``stop``."""
        self._run(self._start())

    def stop(self) -> None:
        """Break all calls and stop listening."""
        server, self._server = self._server, None
        if server is not None:
            self._run(server.stop(None))

    def wait_for(self, condition: Callable[[], T], what: str = "the server to see it") -> T:
        """Wait until a condition on the received messages is true; returns its value."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(condition()), WAIT_SECONDS):
                raise TimeoutError(f"waited {WAIT_SECONDS} s for {what}")
            return condition()

    def note(self) -> None:  # wakes up ``wait_for``
        with self._changed:
            self._changed.notify_all()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_SECONDS)

    async def _start(self) -> None:
        server = aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
        reranker_pb2_grpc.add_RerankerServiceServicer_to_server(_Servicer(self), server)
        address = f"{self.host}:{self.port}"
        secret = self._credentials
        self.port = server.add_secure_port(address, secret) if secret else server.add_insecure_port(address)
        await server.start()
        self._server = server


class _Servicer(reranker_pb2_grpc.RerankerServiceServicer):
    def __init__(self, stub: StubServer) -> None:
        self._stub = stub

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        await self._refuse_if_without("GetModelInfo", context)
        if self._stub.on_info is not None:
            try:
                await self._stub.on_info()
            except Abort as abort:
                await _abort(context, abort)
        major, minor = self._stub.contract
        return pb.GetModelInfoResponse(
            model="stub",
            kind=pb.MODEL_KIND_CROSS_ENCODER,
            fingerprint=self._stub.fingerprint,
            min_length=8,
            max_length=512,
            default_length=512,
            supports_instruction=True,
            default_instruction="",
            limits=self._stub.limits,
            engine="stub",
            dtype="float32",
            contract=pb.ContractVersion(major=major, minor=minor),
        )

    async def Rerank(self, request: Any, context: Any) -> Any:
        def answer(request: Any) -> Any:
            response = self._rank(request)
            response.fingerprint = self._unary_fingerprint()
            return response

        return await self._unary("Rerank", request, context, answer)

    def _unary_fingerprint(self) -> str:
        return self._stub.fingerprint if self._stub.contract >= (1, 1) else ""

    async def RerankBatch(self, request: Any, context: Any) -> Any:
        def answer(batch: Any) -> Any:
            items = [pb.RerankBatchItem(response=self._rank(each)) for each in batch.requests]
            return pb.RerankBatchResponse(items=items, fingerprint=self._unary_fingerprint())

        return await self._unary("RerankBatch", request, context, answer)

    async def RerankStream(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self._refuse_if_without("RerankStream", context)
        stub = self._stub
        stream = ReceivedStream(len(stub.streams), dict(context.invocation_metadata()))
        stub.streams.append(stream)
        replies: asyncio.Queue[Any] = asyncio.Queue()
        reader = asyncio.create_task(self._read(stream, request_iterator, replies))
        try:
            while (reply := await self._next_reply(stream, replies)) is not None:
                if isinstance(reply, Abort):
                    await _abort(context, reply)
                yield reply
                if reply.HasField("result"):
                    stub.note()
        except asyncio.CancelledError:
            stream.cancelled = True
            raise
        finally:
            reader.cancel()
            await asyncio.wait({reader})
            stream.ended = True
            stub.note()

    async def _next_reply(self, stream: ReceivedStream, replies: asyncio.Queue[Any]) -> Any:
        """Wait for a reply; return a progress message if the client asked for one and there is nothing to send."""
        stub = self._stub
        reply = asyncio.ensure_future(replies.get())
        try:
            while True:
                # The first reply is the answer to ``open``, before which the client's settings are not known.
                asked = stub.contract >= (1, 1) and stream.open.HasField("progress_seconds")
                await asyncio.wait({reply}, timeout=stream.open.progress_seconds if asked else None)
                if reply.done():
                    return reply.result()
                if not stub.silent:
                    waiting = len(stream.pairs()) - sum(len(stream.chunks[each].pairs()) for each in stream.answered)
                    return pb.RerankStreamResponse(
                        progress=pb.StreamProgress(
                            pairs_waiting=waiting, pairs_in_server=waiting + stub.ahead, pairs_finished=stub.finished
                        )
                    )
        finally:
            reply.cancel()

    async def _read(self, stream: ReceivedStream, requests: AsyncIterator[Any], replies: asyncio.Queue[Any]) -> None:
        stub, tasks = self._stub, set()
        by_id: dict[int, asyncio.Task[None]] = {}
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind == "chunk":
                    chunk = _received(stream, request.chunk)
                    stream.chunks.append(chunk)
                    if stub.on_chunk is None:
                        replies.put_nowait(self._result(stream, chunk, None))
                    else:
                        by_id[request.chunk.id] = asyncio.create_task(self._scripted(stream, chunk, replies))
                        tasks.add(by_id[request.chunk.id])
                        stub.note()
                elif kind == "cancel":
                    for chunk_id in request.cancel.chunk_ids:
                        stream.given_up.append(chunk_id)
                        if not by_id[chunk_id].done():
                            tasks.remove(by_id[chunk_id])
                            by_id[chunk_id].cancel()
                            error = status_of(grpc.StatusCode.CANCELLED, "cancelled")
                            result = pb.ChunkResult(id=chunk_id, error=error)
                            replies.put_nowait(pb.RerankStreamResponse(result=result))
                    stub.note()
                elif kind == "texts":
                    stream.texts.extend(request.texts.texts)
                    stream.text_messages.append(request.ByteSize())
                else:
                    stream.open = request.open
                    fingerprint = stub.next_fingerprints.pop(0) if stub.next_fingerprints else stub.fingerprint
                    opened = pb.StreamOpened(fingerprint=fingerprint, limits=stub.limits)
                    opened.preferred_pairs_per_chunk = stub.preferred_pairs
                    if stub.on_open is not None:
                        stub.note()
                        await stub.on_open(stream)
                    replies.put_nowait(pb.RerankStreamResponse(opened=opened))
            stream.half_closed = True
            stub.note()
            await asyncio.gather(*tasks)
            replies.put_nowait(None)
        except Exception as error:
            replies.put_nowait(Abort(grpc.StatusCode.INTERNAL, f"the stub failed: {error!r}"))
        finally:
            for task in tasks:
                task.cancel()

    async def _scripted(self, stream: ReceivedStream, chunk: ReceivedChunk, replies: asyncio.Queue[Any]) -> None:
        assert self._stub.on_chunk is not None
        try:
            replies.put_nowait(self._result(stream, chunk, await self._stub.on_chunk(stream, chunk)))
        except Abort as abort:
            replies.put_nowait(abort)

    def _result(self, stream: ReceivedStream, chunk: ReceivedChunk, result: pb.ChunkResult | None) -> Any:
        if result is None:
            options, queries, documents = stream.open.options, chunk.queries, chunk.documents
            if chunk.grid:
                scores = self._stub.score(queries, documents, options).ravel()
            else:
                scores = np.concatenate(
                    [self._stub.score([query], [document], options)[0] for query, document in chunk.pairs()]
                )
            usage = pb.Usage(pairs=len(scores), tokens=10 * len(scores))
            result = pb.ChunkResult(scores=pb.Scores(values=scores.tolist()), usage=usage)
        if not result.HasField("id"):
            result.id = chunk.message.id
        stream.answered.append(chunk.number)
        self._stub.finished += len(result.scores.values)
        return pb.RerankStreamResponse(result=result)

    async def _unary(self, name: str, request: Any, context: Any, answer: Callable[[Any], Any]) -> Any:
        await self._refuse_if_without(name, context)
        self._stub.requests.append(request)
        self._stub.note()
        response = None
        if self._stub.on_request is not None:
            try:
                response = await self._stub.on_request(request)
            except Abort as abort:
                await _abort(context, abort)
        return response or answer(request)

    def _rank(self, request: Any) -> Any:
        scores = self._stub.score([request.query], list(request.documents), request.options)[0]
        order = np.argsort(-scores, kind="stable")[: request.top_n if request.HasField("top_n") else None]
        results = [
            pb.RerankResult(
                index=int(index),
                score=float(scores[index]),
                document=request.documents[index] if request.return_documents else None,
            )
            for index in order
        ]
        return pb.RerankResponse(results=results, usage=pb.Usage(pairs=len(scores), tokens=10 * len(scores)))

    async def _refuse_if_without(self, name: str, context: Any) -> None:
        if name in self._stub.without:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no method {name}")


def _received(stream: ReceivedStream, message: pb.StreamChunk) -> ReceivedChunk:
    ids = message.grid if message.WhichOneof("pairs") == "grid" else message.list
    texts = stream.texts
    queries, documents = [texts[i] for i in ids.query_ids], [texts[i] for i in ids.document_ids]
    return ReceivedChunk(len(stream.chunks), message, queries, documents)


async def _abort(context: Any, abort: Abort) -> None:
    details = (("grpc-status-details-bin", abort.status.SerializeToString()),)
    await context.abort(abort.code, abort.status.message, details)
