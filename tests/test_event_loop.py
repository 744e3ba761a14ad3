"""Event loop: no callback of a stream with thousands of pairs takes longer than 20 ms, so that other calls go on."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from reranker.v1 import reranker_pb2 as pb
from reranker_service.models import make_layout, read_model
from reranker_service.observing.metrics import Metrics
from reranker_service.rpc.admission import Admission
from reranker_service.rpc.limits import Limits
from reranker_service.rpc.stream import StreamSession
from reranker_service.rpc.validation import Validator
from reranker_service.scheduling import Scheduler
from reranker_service.scoring import Scorer

from .servers import ControlledEngine
from .test_stream import OPEN

PAIRS = 16_384
TEXTS = 4096  # of one message
LONGEST_SECONDS = 0.02


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """CPU seconds of each callback; time in which other programs have the processor does not count."""
    found: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        found.append(time.thread_time() - began)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    gc.disable()  # the length of its pauses depends on the objects that all earlier tests left
    yield found
    gc.enable()


async def in_turns(*messages: pb.RerankStreamRequest) -> AsyncIterator[pb.RerankStreamRequest]:
    """Messages that arrive one by one, each in a callback of its own."""
    for message in messages:
        await asyncio.sleep(0)
        yield message


@pytest.mark.parametrize("cache_bytes", [0, 64 << 20])
def test_thousands_of_listed_pairs_of_distinct_queries_hold_up_no_other_call(
    cache_bytes: int, cross_encoder: Path, taken: list[float]
) -> None:
    pairs = pb.PairList(query_ids=range(PAIRS), document_ids=range(PAIRS, 2 * PAIRS))
    messages = [OPEN]
    for begin in range(0, 2 * PAIRS, TEXTS):
        texts = pb.StreamTexts(texts=[f"text {number}" for number in range(begin, begin + TEXTS)])
        messages.append(pb.RerankStreamRequest(texts=texts))
    messages.append(pb.RerankStreamRequest(chunk=pb.StreamChunk(list=pairs)))
    spec = read_model(str(cross_encoder))

    def longest() -> float:
        scheduler = Scheduler(ControlledEngine(max_in_flight=128, max_batch=64))
        scorer = Scorer(spec, make_layout(spec), scheduler, cache_bytes=cache_bytes)
        validator = Validator(Limits(), scorer.ranges)
        session = StreamSession(scorer, validator, pb.GetModelInfoResponse(), Admission(), Metrics())
        replies: asyncio.Queue[pb.RerankStreamResponse] = asyncio.Queue()
        taken.clear()
        asyncio.run(session.run(in_turns(*messages), replies.put))
        scorer.close()
        assert [len(replies.get_nowait().result.scores.values) for _ in range(2)] == [0, PAIRS]
        return max(taken)

    # The processor itself is slower at times; of work that always takes long, no try is short.
    assert any(longest() < LONGEST_SECONDS for _ in range(5)), f"{1000 * max(taken):.0f} ms"
