"""Servicer: the four RPCs. It validates requests, has the scorer score them, and makes the replies.

The handlers are registered by hand rather than by the generated ``add_..._to_server``, and parse the messages
themselves. So a message that cannot be parsed (invalid UTF-8, cut short) fails with INVALID_ARGUMENT, where gRPC itself
would answer INTERNAL. A message of too many fields is refused before it is parsed, and a refused message is freed at
once. Large messages are counted and parsed on a thread: 8 MiB of short texts took 0.14 s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc import aio

from reranker.v1 import reranker_pb2 as pb

from ..observing.metrics import Call, Load, Metrics
from ..scoring import Pairs, Scored, Scorer, TextTable, Ticket
from .admission import Admission
from .errors import RerankError, as_rerank_error, invalid, not_ready
from .messages import usage_message
from .stream import StreamSession, Write
from .validation import Ranking, Validator
from .wire import SMALL_BYTES

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["RerankerService"]
SERVICE = _DESCRIPTOR.full_name
"""Full name of the service."""
RPCS = tuple(method.name for method in _DESCRIPTOR.methods)
"""Names of its RPCs."""
SCORING_RPCS = tuple(rpc for rpc in RPCS if rpc != "GetModelInfo")
"""Names of its RPCs that score pairs."""

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Context = aio.ServicerContext[Message, Message]

# Other calls get their turn between the costs of so many requests of a batch.
_COSTS_AT_ONCE = 32


class _Requests:
    """The messages of a stream. A generator, such as gRPC's own, would hold each message until the next one comes."""

    def __init__(
        self,
        context: Context,
        parse: Callable[[type[pb.RerankStreamRequest], bytes], Awaitable[pb.RerankStreamRequest]],
    ) -> None:
        self._context = context
        self._parse = parse

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> pb.RerankStreamRequest:
        data: Any = await self._context.read()
        if data is aio.EOF:
            raise StopAsyncIteration
        return await self._parse(pb.RerankStreamRequest, data)


def _judge(call: Call, context: Context, code: grpc.StatusCode) -> None:
    """Set the status that a call ends with: in ``call`` for metrics, in ``context`` for traces."""
    call.code = code.name
    context.set_code(code)


async def _abort(call: Call, context: Context, error: RerankError) -> None:
    """End a call with the status of ``error``; with CANCELLED where the client has gone and gRPC cannot send it."""
    try:
        # gRPC's abort replaces the trailing metadata that was set before: the request id.
        trailers = (*(context.trailing_metadata() or ()), *error.metadata())
        await context.abort(error.code, error.message, trailing_metadata=trailers)
    except aio.AbortError:  # gRPC raises it once the status is sent
        call.code = error.code.name
        # The context holds this error, whose traceback holds this frame.
        del context
        raise
    except aio.InternalError:
        _judge(call, context, grpc.StatusCode.CANCELLED)
        raise


class RerankerServicer:
    """Answers the four RPCs of ``reranker.v1.RerankerService``, with UNAVAILABLE until ``open`` is called."""

    def __init__(self, metrics: Metrics | None = None, admission: Admission | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._admission = admission or Admission()
        self._scorer: Scorer | None = None
        self._validator: Validator | None = None
        self._info = pb.GetModelInfoResponse()
        # One thread, because several would take turns with the event loop for the interpreter.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parsing")

    def open(self, scorer: Scorer, validator: Validator, info: pb.GetModelInfoResponse) -> None:
        """Answer calls from now on with these."""
        self._scorer, self._validator, self._info = scorer, validator, info

    @property
    def pairs_in_flight(self) -> int:
        """Pairs that were read and have no score yet."""
        return self._admission.pairs

    def load(self) -> Load:
        """Work of the server and the bytes held for it at this moment; may be called from any thread."""
        load = Load() if self._scorer is None else self._scorer.load()
        return replace(load, held_bytes=self._admission.budget.held)

    def handler(self) -> grpc.GenericRpcHandler:
        """The handlers for ``server.add_generic_rpc_handlers``."""

        def unary(
            rpc: str, answer: Callable[[Request], Awaitable[Response]], message: type[Request]
        ) -> grpc.RpcMethodHandler[Request, Response]:
            async def handle(data: bytes, context: Context) -> bytes:
                with self._metrics.call(rpc) as call:
                    _judge(call, context, grpc.StatusCode.CANCELLED)
                    try:
                        reply = (await answer(await self._parse(message, data))).SerializeToString()
                    except Exception as error:
                        aborting = _abort(call, context, as_rerank_error(error))
                    else:
                        _judge(call, context, grpc.StatusCode.OK)
                        return reply
                    # The context holds the error that ends the call, and the error's traceback holds this frame.
                    del data, context
                    await aborting
                    raise AssertionError("a call goes on after its end")

            return grpc.unary_unary_rpc_method_handler(handle)

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Rerank": unary("Rerank", self.rerank, pb.RerankRequest),
                "RerankBatch": unary("RerankBatch", self.rerank_batch, pb.RerankBatchRequest),
                "GetModelInfo": unary("GetModelInfo", self.get_model_info, pb.GetModelInfoRequest),
                "RerankStream": grpc.stream_stream_rpc_method_handler(
                    self._rerank_stream, response_serializer=lambda response: response.SerializeToString()
                ),
            },
        )

    async def rerank(self, request: pb.RerankRequest) -> pb.RerankResponse:
        """Rank the documents of one query. Raises ``RerankError``."""
        self._ready()
        response = await self._rank("Rerank", request, Ticket(object(), interactive=True))
        response.fingerprint = self._info.fingerprint
        return response

    async def rerank_batch(self, request: pb.RerankBatchRequest) -> pb.RerankBatchResponse:
        """Answer each request with a response or an error.

        Raises:
            RerankError: The batch itself is invalid, or the server has no room for it.
        """
        scorer, validator = self._ready()
        # One ticket for all requests: the engine is shared fairly between calls, whatever their size.
        ticket = Ticket(object(), validator.batch(request))

        async def item(position: int, one: pb.RerankRequest) -> pb.RerankBatchItem:
            try:
                response = await self._rank("RerankBatch", one, ticket, f"requests[{position}].")
                return pb.RerankBatchItem(response=response)
            except Exception as error:
                return pb.RerankBatchItem(error=as_rerank_error(error).to_status())

        cost = 0
        for begin in range(0, len(request.requests), _COSTS_AT_ONCE):
            cost += sum(self._cost(scorer, one) for one in request.requests[begin : begin + _COSTS_AT_ONCE])
            await asyncio.sleep(0)
        with self._admission.budget.hold(cost):
            tasks = [asyncio.create_task(item(position, one)) for position, one in enumerate(request.requests)]
            try:
                return pb.RerankBatchResponse(items=await asyncio.gather(*tasks), fingerprint=self._info.fingerprint)
            finally:
                for task in tasks:
                    task.cancel()

    async def get_model_info(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        """Describe the served model."""
        self._ready()
        return self._info

    async def rerank_stream(self, requests: AsyncIterator[pb.RerankStreamRequest], write: Write) -> None:
        """Score the chunks of a stream; see ``StreamSession.run``. Raises ``RerankError``."""
        scorer, validator = self._ready()
        session = StreamSession(scorer, validator, self._info, self._admission, self._metrics, self._thread)
        await session.run(requests, write)

    async def _rerank_stream(self, _: AsyncIterator[bytes], context: Context) -> AsyncIterator[pb.RerankStreamResponse]:
        with self._metrics.call("RerankStream") as call:
            _judge(call, context, grpc.StatusCode.CANCELLED)
            try:
                # A cancelled write ends this handler at once. gRPC writes what a handler yields, and leaves the
                # handler and the span around it to the garbage collector where that write is cancelled.
                await self.rerank_stream(_Requests(context, self._parse), context.write)
                # The requests of a cancelled call end like those of a half-closed one, up to a few milliseconds before
                # gRPC cancels this task. gRPC finishes another read only after it has reported the cancellation.
                await context.read()
                _judge(call, context, grpc.StatusCode.OK)
            except aio.InternalError:  # a reply cannot be sent
                raise
            except Exception as error:
                aborting = _abort(call, context, as_rerank_error(error))
            else:
                return
            # As in ``handler``: a cycle of context, error and frame would keep the stream's texts.
            del _, context
            await aborting
        # OpenTelemetry's interceptor takes a handler of streams for an asynchronous generator.
        if False:
            yield

    async def _parse(self, message: type[Request], data: bytes) -> Request:
        """Parse the bytes of a message. Raises ``RerankError``."""
        _, validator = self._ready()
        if len(data) <= SMALL_BYTES:
            return self._parsed(validator, message, data)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._parsed, validator, message, data)

    @staticmethod
    def _parsed(validator: Validator, message: type[Request], data: bytes) -> Request:
        validator.size(message, data)
        try:
            return message.FromString(data)
        except DecodeError as error:
            raise invalid(
                "message",
                f"{len(data)} bytes are no {message.DESCRIPTOR.full_name}: {error}; strings must be UTF-8",
            ) from None

    def _ready(self) -> tuple[Scorer, Validator]:
        if self._scorer is None or self._validator is None:
            raise not_ready()
        return self._scorer, self._validator

    async def _rank(self, rpc: str, request: pb.RerankRequest, ticket: Ticket, at: str = "") -> pb.RerankResponse:
        """Answer one request; ``at`` is its path in a batch. Raises ``RerankError``."""
        scorer, validator = self._ready()
        try:
            ranking = validator.rerank(request, at)
            held = 0 if at else self._cost(scorer, request)  # a batch holds the bytes of all its requests
            with self._admission.budget.hold(held), self._admission.ranking(len(ranking.documents)):
                scored = await self._score(scorer, ranking, ticket)
        except Exception as error:
            known = as_rerank_error(error)
            self._metrics.refusal(rpc, known.code.name)
            # as_rerank_error has logged an unforeseen error.
            raise known from None
        known_at = time.monotonic()
        self._metrics.reply(rpc, scored.usage)
        response = pb.RerankResponse(usage=usage_message(scored.usage))
        for index in np.argsort(-scored.scores, kind="stable")[: ranking.top_n].tolist():
            result = response.results.add(index=index, score=float(scored.scores[index]))
            if ranking.return_documents:
                result.document = ranking.documents[index]
        self._metrics.sent(time.monotonic() - known_at)
        return response

    @staticmethod
    def _cost(scorer: Scorer, request: pb.RerankRequest) -> int:
        """Bytes that the server holds for a ranking: the message, what scoring makes of it, and the reply."""
        options, longest = request.options, scorer.ranges.max_length
        max_length = min(options.max_length, longest) if options.HasField("max_length") else longest
        copies = 3 if request.return_documents else 1
        return copies * request.ByteSize() + scorer.costs.ranking(
            request.query, request.documents, options.instruction, max_length
        )

    @staticmethod
    async def _score(scorer: Scorer, ranking: Ranking, ticket: Ticket) -> Scored:
        count = len(ranking.documents)
        # The query is text 0, the documents are texts 1 to count.
        table = TextTable(ranking.options, ticket, [ranking.query, *ranking.documents])
        pairs = Pairs(np.zeros(1, dtype=np.int64), np.arange(1, count + 1), grid=True)
        try:
            return await scorer.score(table, pairs)
        finally:
            table.close()
