"""Scripts: streams whose messages are right one by one, in any order, against a model of the contract.

The model says for each script how the stream must end, and which results its chunks may have: each chunk of a stream
that is half-closed gets exactly one, and no chunk of any stream gets two.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import hypothesis
from google.rpc import code_pb2
from grpc import StatusCode
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from .target import TEXTS, Target

AT_ONCE = 16
MOST_TEXTS, MOST_PAIRS, MOST_IN_FLIGHT, MOST_CHUNKS = 12, 12, 8, 6
FLAGS = (
    *("--limits.max-texts-per-stream", str(MOST_TEXTS), "--limits.max-pairs-per-chunk", str(MOST_PAIRS)),
    *("--limits.max-pairs-in-flight", str(MOST_IN_FLIGHT), "--limits.max-chunks-per-stream", str(MOST_CHUNKS)),
)
"""Flags of the server: limits so low that scripts reach them."""
_SECONDS = 30
_LATE_SECONDS = 0.2


@dataclass(frozen=True)
class Script:
    """What a client does on one stream.

    Attributes:
        messages: The messages that it sends, in order.
        half_closes: Whether it half-closes after them and reads all replies; otherwise it cancels the call.
        reads: "eager": it reads from the begin on; "late": only after its last message. A client that cancels reads one
            reply before, or none.
    """

    messages: tuple[pb.RerankStreamRequest, ...]
    half_closes: bool
    reads: str


_ids = st.lists(st.integers(0, 13) | st.integers(0, 4) | st.just((1 << 32) - 1), max_size=4)
_chunk_ids = st.integers(0, 7) | st.just((1 << 64) - 1)
_open = st.builds(
    lambda raw, priority, progress: pb.RerankStreamRequest(
        open=pb.StreamOpen(options=pb.RerankOptions(score_type=raw), priority=priority, progress_seconds=progress)
    ),
    st.sampled_from((0, 1, 2)),
    st.sampled_from((0, 1, 2)),
    st.sampled_from((None, None, 0.1)),
)
_texts = st.lists(st.sampled_from(TEXTS), max_size=5).map(
    lambda texts: pb.RerankStreamRequest(texts=pb.StreamTexts(texts=texts))
)
_grid = st.builds(
    lambda number, queries, documents: pb.RerankStreamRequest(
        chunk=pb.StreamChunk(id=number, grid=pb.PairGrid(query_ids=queries, document_ids=documents))
    ),
    *(_chunk_ids, _ids, _ids),
)
_list = st.builds(
    lambda number, ids, more: pb.RerankStreamRequest(
        chunk=pb.StreamChunk(id=number, list=pb.PairList(query_ids=ids, document_ids=[*ids[::-1], *more]))
    ),
    *(_chunk_ids, _ids, st.sampled_from(((), (), (1,)))),
)
_no_pairs = _chunk_ids.map(lambda number: pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number)))
_cancel = st.lists(_chunk_ids, max_size=3).map(
    lambda ids: pb.RerankStreamRequest(cancel=pb.StreamCancel(chunk_ids=ids))
)
_any = st.one_of(_texts, _grid, _grid, _list, _list, _cancel, _no_pairs, _open, st.just(pb.RerankStreamRequest()))
_likely = st.one_of(_grid, _list, _grid, _list, _cancel, _texts)
_plausible = st.builds(lambda first, texts, rest: [first, texts, *rest], _open, _texts, st.lists(_likely, max_size=8))
SCRIPTS = st.builds(
    lambda messages, half_closes, reads: Script(tuple(messages), half_closes, reads),
    _plausible | _plausible | st.lists(_any, max_size=8),
    st.sampled_from((True, True, True, False)),
    st.sampled_from(("eager", "eager", "late")),
)
"""Scripts, most of them nearly right."""


@dataclass
class Expected:
    """What the contract says about a script.

    Attributes:
        broken: Whether a message ends the stream with INVALID_ARGUMENT.
        opened: Whether the server accepts the stream.
        raw: Whether scores are raw.
        chunks: Pairs of each chunk that is read, by id; ``None`` for a chunk that must fail.
        cancelled: Ids of chunks that may end with CANCELLED.
    """

    broken: bool = False
    opened: bool = False
    raw: bool = False
    chunks: dict[int, list[tuple[str, str]] | None] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)


def expect(messages: Sequence[pb.RerankStreamRequest]) -> Expected:
    """The model of the contract."""
    expected = Expected()
    texts: list[str] = []
    for message in messages:
        kind = message.WhichOneof("message")
        if (kind == "open") == expected.opened or kind is None:
            expected.broken = True
        elif kind == "open":
            expected.opened = True
            expected.raw = message.open.options.score_type == pb.SCORE_TYPE_RAW
        elif kind == "texts":
            texts += message.texts.texts
            expected.broken = not message.texts.texts or len(texts) > MOST_TEXTS
        elif kind == "cancel":
            expected.broken = not message.cancel.chunk_ids
            expected.cancelled |= set(message.cancel.chunk_ids) & set(expected.chunks)
        elif message.chunk.id in expected.chunks or len(expected.chunks) == MOST_CHUNKS:
            expected.broken = True
        else:
            expected.chunks[message.chunk.id] = _pairs(message.chunk, texts)
        if expected.broken:
            break
    return expected


def _pairs(chunk: pb.StreamChunk, texts: Sequence[str]) -> list[tuple[str, str]] | None:
    """The texts of a chunk's pairs; ``None`` if the chunk is wrong."""
    kind = chunk.WhichOneof("pairs")
    if kind is None:
        return None
    source = chunk.grid if kind == "grid" else chunk.list
    queries, documents = list(source.query_ids), list(source.document_ids)
    if kind == "grid":
        pairs = [(query, document) for query in queries for document in documents]
    elif len(queries) == len(documents):
        pairs = list(zip(queries, documents, strict=True))
    else:
        return None
    if not 0 < len(pairs) <= MOST_PAIRS or max(queries + documents) >= len(texts):
        return None
    return [(texts[query], texts[document]) for query, document in pairs]


def play(target: Target, stub: rpc.RerankerServiceStub, script: Script) -> None:
    """Run a script. Raises ``AssertionError`` if the server answers otherwise than the contract says."""
    expected = expect(script.messages)
    sent, over = threading.Event(), threading.Event()

    def requests() -> Iterator[pb.RerankStreamRequest]:
        yield from script.messages
        sent.set()
        if not script.half_closes:
            over.wait(_SECONDS)

    call = stub.RerankStream(requests(), timeout=_SECONDS)
    replies: list[pb.RerankStreamResponse] = []
    try:
        if script.reads != "eager":
            sent.wait(_LATE_SECONDS)  # a broken stream may take no more messages
        if not script.half_closes:
            if script.reads == "eager" and script.messages:
                with contextlib.suppress(grpc.RpcError):
                    replies += itertools.islice(call, 1)
            call.cancel()
        with contextlib.suppress(grpc.RpcError):
            for reply in call:
                replies.append(reply)
    finally:
        over.set()
    _check(target, script, expected, call.code(), replies)


def _check(
    target: Target, script: Script, expected: Expected, code: StatusCode, replies: Sequence[pb.RerankStreamResponse]
) -> None:
    if not script.half_closes:
        assert code in (StatusCode.CANCELLED, StatusCode.INVALID_ARGUMENT)
        assert code == StatusCode.CANCELLED or expected.broken
    else:
        assert code == (StatusCode.INVALID_ARGUMENT if expected.broken else StatusCode.OK), code
    messages = [one for one in replies if not one.HasField("progress")]
    if messages:
        assert expected.opened
        assert messages[0].HasField("opened")
    results = [one.result for one in messages[1:]]
    seen = Counter(one.id for one in results)
    assert set(seen) <= set(expected.chunks), "a result of a chunk that was not sent"
    assert max(seen.values(), default=1) == 1, "two results of a chunk"
    if code == StatusCode.OK:
        assert set(seen) == set(expected.chunks), "a chunk without a result"
        assert bool(messages) == expected.opened
    for one in results:
        pairs = expected.chunks[one.id]
        if one.HasField("error"):
            cancelled = one.error.code == code_pb2.CANCELLED and one.id in expected.cancelled
            assert cancelled or (pairs is None and one.error.code == code_pb2.INVALID_ARGUMENT), one
        else:
            assert pairs is not None, "scores of a wrong chunk"
            assert target.are_right(pairs, one.scores.values, raw=expected.raw), one


def run(target: Target, count: int, seed: int) -> int:
    """Run at least ``count`` scripts, some at once on one connection; returns their number. A failing one is shrunk."""
    done = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=-(-count // AT_ONCE),
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.lists(SCRIPTS, min_size=AT_ONCE, max_size=AT_ONCE))
    def examples(scripts: list[Script]) -> None:
        nonlocal done
        for _ in threads.map(functools.partial(play, target, stub), scripts):
            done += 1

    with grpc.insecure_channel(target.address) as channel, ThreadPoolExecutor(AT_ONCE) as threads:
        stub = rpc.RerankerServiceStub(channel)
        examples()
    return done
