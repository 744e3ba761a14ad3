"""Statuses that clients see when the engine breaks its protocol or runs out of memory; later calls are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import aio
from numpy.typing import NDArray

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.engines import EngineMemoryError, TokenSequence

from .servers import ControlledEngine, serve_in_process

LONG = 40


class FaultyEngine(ControlledEngine):
    """Fails batches with a sequence of at least ``LONG`` tokens: by an error, or by a result too few."""

    def __init__(self, fault: str) -> None:
        super().__init__(max_batch=4)
        self.fault = fault

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        found = await super().run(sequences, urgent)
        long = found >= LONG
        if not long.any():
            return found
        if self.fault == "memory":
            raise EngineMemoryError("no memory for a sequence", np.where(long, np.nan, found).astype(np.float32))
        return found[1:]


@pytest.mark.parametrize(
    ("fault", "code"),
    [("memory", grpc.StatusCode.RESOURCE_EXHAUSTED), ("length", grpc.StatusCode.INTERNAL)],
)
def test_an_engines_fault_fails_one_call_and_one_chunk(fault: str, code: grpc.StatusCode, cross_encoder: Path) -> None:
    async def scenario() -> None:
        async with serve_in_process(cross_encoder, FaultyEngine(fault), cache_bytes=1 << 20) as channel:
            stub = rpc.RerankerServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Rerank(pb.RerankRequest(query="q", documents=["short", "word " * LONG]), timeout=60)
            assert caught.value.code() == code
            assert len((await stub.Rerank(pb.RerankRequest(query="q", documents=["short"]), timeout=60)).results) == 1
            stream = stub.RerankStream(timeout=60)
            await stream.write(pb.RerankStreamRequest(open=pb.StreamOpen()))
            texts = pb.StreamTexts(texts=["query", "word " * LONG, "short"])
            await stream.write(pb.RerankStreamRequest(texts=texts))
            for number in (1, 2):
                grid = pb.PairGrid(query_ids=[0], document_ids=[number])
                await stream.write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, grid=grid)))
            await stream.done_writing()
            results = {reply.result.id: reply.result async for reply in stream if reply.HasField("result")}
            assert results[1].error.code == code.value[0]
            assert len(results[2].scores.values) == 1

    asyncio.run(scenario())
