"""Many clients at once: every score is right, streams share the engine, interactive calls come first."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc import aio
from sentence_transformers import CrossEncoder

from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.scheduling import Job, Scheduler

from .servers import ControlledEngine, ServerProcess, serve_in_process

TEXTS = [f"{word} number {i}" for i in range(12) for word in ("query", "document", "naïve – text")]


def test_32_clients_with_mixed_calls_get_every_score_right(
    cross_encoder_server: ServerProcess, cross_encoder: Path
) -> None:
    pairs = [(query, document) for query in TEXTS for document in TEXTS]
    table = CrossEncoder(str(cross_encoder), device="cpu").predict(pairs, batch_size=256).reshape(len(TEXTS), -1)

    def batch(stub: rpc.RerankerServiceStub, queries: list[str], documents: list[str]) -> np.ndarray:
        requests = [pb.RerankRequest(query=query, documents=documents) for query in queries]
        reply = stub.RerankBatch(pb.RerankBatchRequest(requests=requests))
        ranked = [sorted(item.response.results, key=lambda one: one.index) for item in reply.items]
        return np.array([[one.score for one in row] for row in ranked])

    def work(number: int) -> None:
        draw = random.Random(number)
        address = cross_encoder_server.address
        with RerankerClient(address) as client, grpc.insecure_channel(address) as channel:
            stub = rpc.RerankerServiceStub(channel)
            for _ in range(6):
                queries, documents = draw.sample(range(len(TEXTS)), 5), draw.sample(range(len(TEXTS)), 7)
                expected = table[np.ix_(queries, documents)]
                texts = [TEXTS[one] for one in documents]
                call = draw.choice(("rerank", "batch", "grid", "pairs"))
                if call == "grid":
                    found = client.score_grid([TEXTS[one] for one in queries], texts, chunk_pairs=draw.choice((1, 8)))
                elif call == "batch":
                    found = batch(stub, [TEXTS[one] for one in queries], texts)
                elif call == "pairs":
                    found = client.score_pairs([(TEXTS[queries[0]], text) for text in texts])
                    expected = expected[0]
                else:
                    ranked = client.rerank(TEXTS[queries[0]], texts)
                    found = np.array([one.score for one in sorted(ranked, key=lambda one: one.index)])
                    expected = expected[0]
                np.testing.assert_allclose(found, expected, atol=1e-5)

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(work, range(32)))


def test_a_client_that_never_reads_does_not_grow_the_server(cross_encoder: Path) -> None:
    """The client requests a gigabyte of scores; the cache knows all of them after the first chunk."""
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1"]
    pairs = pb.PairList(query_ids=[0] * 8192, document_ids=[1] * 8192)  # 32 kB of scores, 16 kB of ids
    chunks = 32_768

    async def write(address: str) -> int:
        written = 0
        async with aio.insecure_channel(address) as channel:
            call = rpc.RerankerServiceStub(channel).RerankStream()
            await call.write(pb.RerankStreamRequest(open=pb.StreamOpen()))
            await call.write(pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["a", "b"])))

            async def write_all() -> None:
                nonlocal written
                for number in range(chunks):
                    await call.write(pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, list=pairs)))
                    written += 1

            writer = asyncio.create_task(write_all())
            before = -1
            while written != before:  # the writer stops when every buffer on the way is full
                before = written
                await asyncio.wait({writer}, timeout=2)
            grown = process.memory_info().rss - rss
            assert grown < 64 << 20, f"the server grew by {grown >> 20} MiB"
            call.cancel()
            await asyncio.wait({writer})
        return written

    with ServerProcess(*flags) as server, RerankerClient(server.address) as client:
        client.score_pairs([("a", "b")])
        process = psutil.Process(server.pid)
        rss = process.memory_info().rss
        written = asyncio.run(write(server.address))
        assert 0 < written < chunks
        client.score_pairs([("c", "d")])  # other clients are still served


def _grid(number: int) -> pb.RerankStreamRequest:
    grid = pb.PairGrid(query_ids=[0], document_ids=range(1, 9))
    return pb.RerankStreamRequest(chunk=pb.StreamChunk(id=number, grid=grid))


class Submissions:
    """Counts the jobs that reach the scheduler, so that a test can wait for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.changed = asyncio.Condition()
        original = Scheduler.run

        async def run(scheduler: Scheduler, job: Job) -> np.ndarray:
            running = asyncio.ensure_future(original(scheduler, job))
            async with self.changed:
                self.count += 1
                self.changed.notify_all()
            return await running

        monkeypatch.setattr(Scheduler, "run", run)

    async def reach(self, count: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.count >= count)


def test_two_streams_share_the_engine_and_a_small_call_overtakes_both(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gets one batch at a time; the length of its sequences tells whose batch it is."""

    class Recording(ControlledEngine):
        async def run(self, sequences: object, urgent: bool = False) -> np.ndarray:
            self.owners.append(len(sequences[0].ids))
            return await super().run(sequences, urgent)

    async def scenario() -> list[int]:
        engine = Recording(max_in_flight=8, max_batch=8, open_gate=False)
        engine.owners = []
        jobs = Submissions(monkeypatch)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)

            async def stream(text: str) -> int:
                async def send() -> object:
                    yield pb.RerankStreamRequest(open=pb.StreamOpen())
                    yield pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[text] * 9))
                    for number in range(20):
                        yield _grid(number)

                return len([reply async for reply in stub.RerankStream(send())])

            streams = [asyncio.ensure_future(stream(text)) for text in ("a", "a a a a a a a a")]
            await jobs.reach(40)
            small = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a a a", documents=["a a a"])))
            await jobs.reach(41)
            engine.gate.set()
            await small
            assert await asyncio.gather(*streams) == [21, 21]
        return engine.owners

    owners = asyncio.run(scenario())
    short, long, small = min(owners), max(owners), sorted(set(owners))[1]
    # Only the batch that was in the engine before the small call arrived comes first.
    assert owners.index(small) == 1
    # While both streams have work, both get the same number of tokens.
    last = min(len(owners) - owners[::-1].index(length) for length in (short, long))
    both = owners[2:last]
    tokens = {length: both.count(length) * length for length in (short, long)}
    assert abs(tokens[short] - tokens[long]) <= 0.2 * max(tokens.values())


def test_a_large_batch_does_not_starve_a_single_call(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> list[int]:
        engine = ControlledEngine(max_in_flight=1, max_batch=1, open_gate=False)
        jobs = Submissions(monkeypatch)
        async with serve_in_process(cross_encoder, engine) as channel:
            stub = rpc.RerankerServiceStub(channel)
            requests = [pb.RerankRequest(query="a", documents=["a a a a a a a a"]) for _ in range(64)]
            batch = asyncio.ensure_future(stub.RerankBatch(pb.RerankBatchRequest(requests=requests)))
            await jobs.reach(64)
            single = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a", documents=["a"] * 4)))
            await jobs.reach(65)
            engine.gate.set()
            await asyncio.gather(batch, single)
        return [len(one[0].ids) for one in engine.batches]

    lengths = asyncio.run(scenario())
    assert len(lengths) == 64 + 4
    # Calls share the engine, whatever their number of requests: the single call's pairs come among the first.
    assert [place for place, length in enumerate(lengths) if length == min(lengths)][-1] < 8
