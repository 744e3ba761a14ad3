"""Metrics around the engine: runs of the tokenizer, batches, waiting and running sequences, the cache."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from grpc import aio
from prometheus_client import generate_latest

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.models import make_layout, read_model
from reranker_service.observing.prometheus import PrometheusMetrics
from reranker_service.rpc.limits import Limits
from reranker_service.rpc.servicer import RPCS, SCORING_RPCS, RerankerServicer
from reranker_service.rpc.validation import Validator
from reranker_service.scheduling import Scheduler
from reranker_service.scoring import Scorer

from .scrapes import Scrape, scrape, scraped
from .servers import ControlledEngine, ServerProcess


def test_texts_are_tokenized_once_and_batches_hold_what_the_replies_count(cross_encoder: Path) -> None:
    """A grid of 3 x 5 in two chunks, then the same grid again."""
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--metrics-port", "0"]
    chunks = [([0, 1], range(3, 8)), ([2], range(3, 8)), ([0, 1, 2], range(3, 8))]
    messages = [
        pb.RerankStreamRequest(open=pb.StreamOpen()),
        pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[f"text number {i}" for i in range(8)])),
        *(
            pb.RerankStreamRequest(
                chunk=pb.StreamChunk(id=number, grid=pb.PairGrid(query_ids=queries, document_ids=documents))
            )
            for number, (queries, documents) in enumerate(chunks)
        ),
    ]
    with ServerProcess(*flags) as server, grpc.insecure_channel(server.address) as channel:
        before = scrape(server)
        replies = list(rpc.RerankerServiceStub(channel).RerankStream(iter(messages), timeout=60))
        change = scrape(server) - before
        bytes_kept = scrape(server)["reranker_cache_bytes"]
    usages = [one.result.usage for one in replies[1:]]
    assert sum(usage.pairs for usage in usages) == 30
    assert change["reranker_encoded_texts_total"] == 8
    assert change["reranker_encoding_seconds_count"] >= 2
    assert change["reranker_encoding_seconds_sum"] > 0
    assert change["reranker_batch_sequences_sum"] == change["reranker_pairs_total", "engine"] == 15
    assert change["reranker_pairs_total", "cache"] + change["reranker_pairs_total", "shared"] == 15
    tokens = sum(usage.tokens for usage in usages)
    assert change["reranker_batch_tokens_sum"] == change["reranker_tokens_total"] == tokens
    assert before["reranker_cache_bytes"] == 0
    assert bytes_kept > 0


def test_waiting_and_running_sequences_and_held_bytes_are_on_the_page(cross_encoder: Path) -> None:
    async def scenario() -> list[Scrape]:
        metrics = PrometheusMetrics(RPCS, SCORING_RPCS)
        engine = ControlledEngine(max_in_flight=4, max_batch=4, open_gate=False)
        spec = read_model(str(cross_encoder))
        scorer = Scorer(spec, make_layout(spec), Scheduler(engine, metrics))
        servicer = RerankerServicer(metrics)
        metrics.watch(servicer.load)
        servicer.open(scorer, Validator(Limits(), scorer.ranges), pb.GetModelInfoResponse())
        server = aio.server()
        server.add_generic_rpc_handlers((servicer.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        async def look() -> Scrape:
            # On another thread than the event loop's, as the real metrics server does.
            return scraped((await asyncio.to_thread(generate_latest, metrics.registry)).decode())

        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rpc.RerankerServiceStub(channel)
            documents = [f"document {i}" for i in range(10)]
            call = asyncio.ensure_future(stub.Rerank(pb.RerankRequest(query="a query", documents=documents)))
            await engine.wait_for_sequences(4)
            held = await look()
            later = await look()
            engine.gate.set()
            await call
            done = await look()
        await server.stop(None)
        scorer.close()
        return [held, later, done]

    held, later, done = asyncio.run(scenario())
    assert (held["reranker_queue_sequences"], held["reranker_engine_sequences"]) == (6, 4)
    assert 0 < held["reranker_queue_age_seconds"] < later["reranker_queue_age_seconds"]
    assert held["reranker_requests_in_progress", "Rerank"] == 1
    assert held["reranker_batch_sequences_count"] == 1
    assert 12 << 10 < held["reranker_held_bytes"] < 64 << 10  # a ranking of ten short documents
    assert done["reranker_held_bytes"] == 0
    assert (done["reranker_queue_sequences"], done["reranker_engine_sequences"]) == (0, 0)
    assert done["reranker_queue_age_seconds"] == 0
    assert done["reranker_requests_in_progress", "Rerank"] == 0
    # The ten sequences entered as batches of 4, 4 and 2.
    assert done["reranker_batch_sequences_count"] == 3
    assert done["reranker_batch_sequences_sum"] == 10
