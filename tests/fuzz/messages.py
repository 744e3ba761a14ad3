"""Messages: sends mutated and random messages to every RPC, and checks each status and each score.

A message is made from a seed, the name of its RPC and its number, so that a failing one can be made again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from reranker.v1 import reranker_pb2 as pb

from .mutation import mutated
from .target import TEXTS, Target

SEED = 20_240_611
CONCURRENCY = 48
_CALL_SECONDS = 30
_SERVICE = "/reranker.v1.RerankerService/"
_PROPER = frozenset({StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED})
_KNOWN = frozenset(TEXTS)


def _options(draw: random.Random) -> pb.RerankOptions | None:
    if draw.random() < 0.5:
        return None
    return pb.RerankOptions(
        score_type=draw.choice((0, 1, 2)), over_long=draw.choice((0, 1, 2)), max_length=draw.choice((None, 64))
    )


def _rerank(draw: random.Random) -> pb.RerankRequest:
    return pb.RerankRequest(
        query=draw.choice(TEXTS),
        documents=draw.choices(TEXTS, k=draw.randint(1, 4)),
        top_n=draw.choice((None, 1, 2, 9)),
        return_documents=draw.choice((None, False, True)),
        options=_options(draw),
    )


def _batch(draw: random.Random) -> pb.RerankBatchRequest:
    requests = [_rerank(draw) for _ in range(draw.randint(1, 3))]
    return pb.RerankBatchRequest(requests=requests, priority=draw.choice((0, 1, 2)))


def _stream(draw: random.Random) -> pb.RerankStreamRequest:
    """One message of a stream whose earlier messages were ``open`` and five texts."""
    ids = draw.choices(range(5), k=draw.randint(1, 3))
    match draw.choice(("open", "texts", "grid", "grid", "list", "cancel")):
        case "open":
            progress = draw.choice((None, 0.1, 60.0))
            opening = pb.StreamOpen(options=_options(draw), priority=draw.choice((0, 1, 2)), progress_seconds=progress)
            return pb.RerankStreamRequest(open=opening)
        case "texts":
            return pb.RerankStreamRequest(texts=pb.StreamTexts(texts=draw.choices(TEXTS, k=draw.randint(1, 4))))
        case "grid":
            grid = pb.PairGrid(query_ids=ids, document_ids=draw.choices(range(5), k=3))
            return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=draw.randrange(2, 1 << 64), grid=grid))
        case "list":
            listed = pb.PairList(query_ids=ids, document_ids=ids)
            return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=draw.randrange(2, 9), list=listed))
    return pb.RerankStreamRequest(cancel=pb.StreamCancel(chunk_ids=draw.choices(range(9), k=draw.randint(1, 3))))


def _info(draw: random.Random) -> Message:
    # The request has no fields; those of another message are unknown to it.
    return pb.GetModelInfoRequest() if draw.random() < 0.1 else _rerank(draw)


def _check(draw: random.Random) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=draw.choice(("", "reranker.v1.RerankerService", "no.such.Service")))


def _reflect(draw: random.Random) -> reflection_pb2.ServerReflectionRequest:
    kind, value = draw.choice(
        (
            ("list_services", ""),
            ("file_by_filename", "reranker/v1/reranker.proto"),
            ("file_containing_symbol", "reranker.v1.RerankerService"),
            ("all_extension_numbers_of_type", "google.protobuf.FieldOptions"),
        )
    )
    if draw.random() < 0.2:
        extension = reflection_pb2.ExtensionRequest(containing_type="reranker.v1.RerankRequest", extension_number=3)
        return reflection_pb2.ServerReflectionRequest(file_containing_extension=extension)
    return reflection_pb2.ServerReflectionRequest(host="localhost", **{kind: value})


@dataclass(frozen=True, slots=True)
class _Rpc:
    """An RPC under attack.

    Attributes:
        method: Its path.
        make: Makes a right message.
        streams: Whether requests and replies are streams.
        prefix: Messages that come before the mutated one on a stream, all right.
        proper: Statuses that a call may end with.
    """

    method: str
    make: Callable[[random.Random], Message]
    streams: tuple[bool, bool] = (False, False)
    prefix: tuple[Message, ...] = ()
    proper: frozenset[StatusCode] = _PROPER


_OPENED = (
    pb.RerankStreamRequest(open=pb.StreamOpen()),
    pb.RerankStreamRequest(texts=pb.StreamTexts(texts=TEXTS[:5])),
    pb.RerankStreamRequest(chunk=pb.StreamChunk(id=1, grid=pb.PairGrid(query_ids=[0], document_ids=[1, 2]))),
)
_HEALTH = "/grpc.health.v1.Health/"
RPCS: Mapping[str, _Rpc] = {
    "Rerank": _Rpc(_SERVICE + "Rerank", _rerank),
    "RerankBatch": _Rpc(_SERVICE + "RerankBatch", _batch),
    "RerankStream": _Rpc(_SERVICE + "RerankStream", _stream, (True, True), _OPENED),
    "GetModelInfo": _Rpc(_SERVICE + "GetModelInfo", _info),
    "Health.Check": _Rpc(_HEALTH + "Check", _check, proper=_PROPER | {StatusCode.NOT_FOUND}),
    "Health.Watch": _Rpc(_HEALTH + "Watch", _check, (False, True)),
    "Reflection": _Rpc("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", _reflect, (True, True)),
}
"""The RPCs, by name."""


def message(name: str, number: int, seed: int) -> bytes:
    """The mutated message of an RPC with a number."""
    draw = random.Random(f"{seed} {name} {number}")
    return mutated(RPCS[name].make(draw), draw)


@dataclass(slots=True)
class Faults(Exception):
    """Calls that ended in a way in which no call may end."""

    found: list[str]

    def __str__(self) -> str:
        return f"{len(self.found)} faults\n" + "\n".join(self.found[:10])


async def fuzz(target: Target, name: str, numbers: Sequence[int], seed: int = SEED) -> Counter[StatusCode]:
    """Send the messages with some numbers to an RPC; returns how many calls ended with each status.

    Raises:
        Faults: A call ended with an improper status, gave a wrong score, or did not end.
    """
    called = RPCS[name]
    codes: Counter[StatusCode] = Counter()
    faults: list[str] = []
    pending = iter(numbers)

    async def work(channel: aio.Channel) -> None:
        call = _caller(channel, called)
        for number in pending:
            data = message(name, number, seed)
            try:
                replies = await call(data)
                codes[StatusCode.OK] += 1
                wrong = None if _right(target, name, data, replies) else f"wrong scores {replies!r}"
            except aio.AioRpcError as error:
                codes[error.code()] += 1
                wrong = None if error.code() in called.proper else f"{error.code().name}: {error.details()}"
            if wrong is not None:
                faults.append(f"{name} seed={seed} number={number} hex={data.hex()[:2000]}: {wrong}")
                if len(faults) > 100:
                    return

    channels = [
        aio.insecure_channel(target.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(CONCURRENCY // 12)
    ]
    try:
        await asyncio.gather(*(work(channels[place % len(channels)]) for place in range(CONCURRENCY)))
    finally:
        for channel in channels:
            await channel.close()
    if faults:
        raise Faults(faults)
    return codes


def _caller(channel: aio.Channel, called: _Rpc) -> Callable[[bytes], object]:
    """A function that sends a message in a call of its own, and returns the replies once the call has ended well."""
    prefix = [one.SerializeToString() for one in called.prefix]
    asking, answering = called.streams
    if not answering:
        unary = channel.unary_unary(called.method)

        async def single(data: bytes) -> list[bytes]:
            return [await unary(data, timeout=_CALL_SECONDS)]

        return single
    if not asking:
        watching = channel.unary_stream(called.method)

        async def watch(data: bytes) -> list[bytes]:
            call = watching(data, timeout=_CALL_SECONDS)
            reply = await call.read()  # the stream does not end by itself
            call.cancel()
            return [] if reply is aio.EOF else [reply]

        return watch
    streaming = channel.stream_stream(called.method)

    async def stream(data: bytes) -> list[bytes]:
        async def requests() -> AsyncIterator[bytes]:
            for one in (*prefix, data):
                yield one

        return [reply async for reply in streaming(requests(), timeout=_CALL_SECONDS)]

    return stream


def _right(target: Target, name: str, data: bytes, replies: Sequence[bytes]) -> bool:
    """Whether the replies to a message have right scores, as far as these are known."""
    if name == "Rerank":
        return _ranked(target, pb.RerankRequest.FromString(data), pb.RerankResponse.FromString(replies[0]))
    if name == "RerankBatch":
        request, reply = pb.RerankBatchRequest.FromString(data), pb.RerankBatchResponse.FromString(replies[0])
        return len(request.requests) == len(reply.items) and all(
            item.HasField("error") or _ranked(target, one, item.response)
            for one, item in zip(request.requests, reply.items, strict=True)
        )
    if name == "RerankStream":
        return _streamed(target, data, [pb.RerankStreamResponse.FromString(one) for one in replies])
    return bool(replies) or name == "Reflection"


def _ranked(target: Target, request: pb.RerankRequest, reply: pb.RerankResponse) -> bool:
    if request.options.HasField("max_length") or not {request.query, *request.documents} <= _KNOWN:
        return True  # the scores are unknown
    return target.is_right(request, reply)


def _streamed(target: Target, data: bytes, replies: Sequence[pb.RerankStreamResponse]) -> bool:
    """Whether a stream that ended well answered each chunk once, with right scores."""
    results = [one.result for one in replies if one.HasField("result")]
    request = pb.RerankStreamRequest.FromString(data)
    asked = {1: [(0, 1), (0, 2)]}
    if request.WhichOneof("message") == "chunk":
        asked[request.chunk.id] = list(_pairs(request.chunk))
    if sorted(one.id for one in results) != sorted(asked):
        return False
    return all(
        one.HasField("error")
        or target.are_right([(TEXTS[query], TEXTS[document]) for query, document in asked[one.id]], one.scores.values)
        for one in results
    )


def _pairs(chunk: pb.StreamChunk) -> Iterator[tuple[int, int]]:
    if chunk.WhichOneof("pairs") == "grid":
        return ((query, document) for query in chunk.grid.query_ids for document in chunk.grid.document_ids)
    return zip(chunk.list.query_ids, chunk.list.document_ids, strict=False)
