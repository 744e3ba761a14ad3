"""Overhead of the service: time, bytes on the wire and memory with an instant engine, and work done per text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

from benchmarks import scrape
from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.proxy import CountingProxy
from benchmarks.report import Figure
from benchmarks.rounds import Spread
from examples.processes import Child, ProcessError
from loss_client import RerankerClient

_SIDE = 1024
_PAIRS = _SIDE * _SIDE
_QUERY_BYTES, _DOCUMENT_BYTES = 80, 300  # about 100 tokens a pair
_CHUNKS = (1024, 128)
_WIRE_ROUNDS = 2  # bytes hardly vary between rounds
_MIB = 1 << 20
_TIMEOUT = 600.0


def instant_engine(bench: Bench) -> list[Figure]:
    """Measure pairs a second, bytes a pair and memory growth of the server, for streams of 1,024 x 1,024 pairs."""
    texts = bench.corpus.sized(_SIDE, _QUERY_BYTES), bench.corpus.sized(_SIDE, _DOCUMENT_BYTES)
    large = bench.corpus.sized(2 * _SIDE, 1000)
    rates: dict[int, list[float]] = {chunk: [] for chunk in _CHUNKS}
    sizes: dict[int, list[float]] = {chunk: [] for chunk in _CHUNKS}
    growth: list[float] = []
    with bench.launcher.server(bench.models["tiny"], "torch", module="benchmarks.instant") as server:
        address = address_of(server)
        with RerankerClient(address) as client, CountingProxy(address) as proxy, RerankerClient(proxy.address) as other:
            for each in (client, other):
                each.score_grid(texts[0][:128], texts[1][:128])
            before = psutil.Process(server.pid).memory_info().rss
            for number in range(bench.rounds):
                for chunk in _CHUNKS:
                    with _peak_memory(server) as peak:
                        rates[chunk].append(_PAIRS / _seconds(client, *texts, chunk))
                    if chunk == _CHUNKS[0]:
                        growth.append((peak[0] - before) / _MIB)
                    if number < _WIRE_ROUNDS:
                        passed = proxy.bytes
                        _seconds(other, large[:_SIDE], large[_SIDE:], chunk)
                        sizes[chunk].append((proxy.bytes - passed) / _PAIRS)
                bench.say(
                    f"round {number + 1}: "
                    + ", ".join(f"{rates[chunk][-1]:,.0f} pairs/s in chunks of {chunk}" for chunk in _CHUNKS)
                    + f"; server {growth[-1]:+.1f} MiB"
                )
    large_chunk, small_chunk = _CHUNKS
    name = "instant engine"
    return [
        Figure(f"{name}: one stream, chunks of {large_chunk}", Spread.of(rates[large_chunk]), "pairs/s", 500_000),
        Figure(f"{name}: one stream, chunks of {small_chunk}", Spread.of(rates[small_chunk]), "pairs/s"),
        Figure(f"{name}: wire, texts of 1 kB", Spread.of(sizes[large_chunk]), "bytes/pair", 8, False),
        Figure(
            f"{name}: wire, texts of 1 kB, chunks of {small_chunk}",
            Spread.of(sizes[small_chunk]),
            "bytes/pair",
            8,
            False,
        ),
        Figure(f"{name}: server memory, stream of 1,048,576 pairs", Spread.of(growth), "MiB growth", 64, False),
    ]


def once_per_text(bench: Bench) -> list[Figure]:
    """Measure texts tokenized and embedded for grids of 48 x 64, over the number of texts in the grid."""
    queries, documents = 48, 64
    tokenized: dict[str, list[float]] = {"cross-encoder": [], "bi-encoder": []}
    embedded: list[float] = []
    for kind, model in (("cross-encoder", "tiny"), ("bi-encoder", "all-minilm")):
        with bench.launcher.server(bench.models[model], "torch", scrape.FLAGS) as server:
            with RerankerClient(address_of(server)) as client:
                before = scrape.read(server)
                for _ in range(bench.rounds):
                    grid = bench.corpus.grid(queries, documents)
                    client.score_grid(grid.queries, grid.documents, chunk_pairs=256, timeout=_TIMEOUT)
                    after = scrape.read(server)
                    work, before = after.since(before).totals, after
                    if not work["reranker_encoded_texts_total"]:
                        raise ProcessError("the server scored a grid, but its metrics count no tokenized text")
                    tokenized[kind].append(work["reranker_encoded_texts_total"] / (queries + documents))
                    if kind == "bi-encoder":
                        embedded.append(work["reranker_batch_sequences_sum"] / (queries + documents))
    return [
        *(
            Figure(f"{kind}: texts tokenized / (Q + D)", Spread.of(shares), "x", 1.0, False)
            for kind, shares in tokenized.items()
        ),
        Figure("bi-encoder: texts embedded / (Q + D)", Spread.of(embedded), "x", 1.0, False),
    ]


def _seconds(client: RerankerClient, queries: tuple[str, ...], documents: tuple[str, ...], chunk: int) -> float:
    began = time.perf_counter()
    client.score_grid(queries, documents, chunk_pairs=chunk, timeout=_TIMEOUT)
    return time.perf_counter() - began


@contextmanager
def _peak_memory(server: Child) -> Iterator[list[float]]:
    """Yield a list with one number: the highest resident memory of the server during the block, in bytes."""
    process, peak, done = psutil.Process(server.pid), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], process.memory_info().rss)
