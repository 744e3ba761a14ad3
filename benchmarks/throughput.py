"""Throughput in pairs a second: our RPCs against the bare engine, vLLM's HTTP server and baselines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc

from benchmarks.bench import Bench
from benchmarks.http_sides import BASELINE, VLLM_RERANK, VLLM_SCORE, HttpSide
from benchmarks.latency import interactive_latency
from benchmarks.launch import address_of, http_address_of
from benchmarks.report import Figure
from benchmarks.rounds import DOCUMENTS, Contest, Side, contest
from benchmarks.sides import BareSide, BatchSide, StreamSide, UnarySide
from loss_client import RerankerClient

_LARGE_CHUNK = 1024
_LIMIT_SECONDS = {"minilm": 35.0, "tiny": 25.0}
_OTHERS_SECONDS = {"minilm": 15.0, "tiny": 15.0}
_VLLM_SECONDS = {"minilm": 60.0, "tiny": 40.0}
_BARE_TARGET = {"minilm": 0.97, "tiny": 0.9}
_HTTP_TARGETS = {"minilm": (1.05, 1.3), "tiny": (1.5, 2.0)}


def on_torch(bench: Bench, model: str) -> list[Figure]:
    """Compare our RPCs on the torch engine with the bare engine, ``CrossEncoder.predict`` and the HTTP baseline.

    Args:
        bench: The run.
        model: "minilm" or "tiny".
    """
    path = bench.models[model]
    with ExitStack() as stack:
        server = stack.enter_context(bench.launcher.server(path, "torch"))
        bare = stack.enter_context(bench.launcher.bare(path, "torch"))
        predict = stack.enter_context(bench.launcher.bare(path, "predict"))
        plain = stack.enter_context(bench.launcher.baseline(path))
        client = stack.enter_context(RerankerClient(address_of(server)))
        channel = stack.enter_context(_channel(address_of(server)))
        stream, engine = StreamSide("stream", server, client), BareSide("bare", bare)
        large = StreamSide("stream, large chunks", server, client, chunk_pairs=_LARGE_CHUNK)
        # A contest without the slow sides, so that most of its time goes to the comparison with the bare engine.
        limit = _contest(bench, [engine, stream, large], _LIMIT_SECONDS[model])
        sides: list[Side] = [
            stream,
            BareSide("predict", predict),
            HttpSide("plain", plain, address_of(plain), BASELINE),
        ]
        if model == "tiny":
            # Differences in overhead are measurable with the tiny model only, so the other RPCs are compared on it.
            sides += [engine, UnarySide("unary", server, channel), BatchSide("batch", server, channel)]
        others = _contest(bench, sides, _OTHERS_SECONDS[model])
    title = f"torch, {model}"
    figures = [
        Figure(f"{title}: stream / bare engine", limit.ratio("stream", "bare"), "x", _BARE_TARGET[model]),
        Figure(
            f"{title}: stream in chunks of {_LARGE_CHUNK} / bare engine", limit.ratio("stream, large chunks", "bare")
        ),
        Figure(f"{title}: stream / CrossEncoder.predict", others.ratio("stream", "predict")),
        Figure(f"{title}: stream / plain HTTP service", others.ratio("stream", "plain")),
    ]
    if model == "tiny":
        figures.append(Figure(f"{title}: unary / bare engine", others.ratio("unary", "bare")))
        figures.append(Figure(f"{title}: batch / bare engine", others.ratio("batch", "bare")))
    return [*figures, Figure(f"{title}: stream", limit.rate("stream"), "pairs/s")]


def on_vllm(bench: Bench, model: str) -> list[Figure]:
    """Compare our stream on the vLLM engine with the bare engine and vLLM's HTTP server.

    With the tiny model, small requests beside a stream are measured on the same server as well.

    Args:
        bench: The run.
        model: "minilm" or "tiny".
    """
    path, title = bench.models[model], f"vllm, {model}"
    figures: list[Figure] = []
    with bench.launcher.server(path, "vllm") as server:
        with ExitStack() as stack:
            bare = stack.enter_context(bench.launcher.bare(path, "vllm"))
            http = stack.enter_context(bench.launcher.vllm_http(path))
            client = stack.enter_context(RerankerClient(address_of(server)))
            address = http_address_of(http)
            sides: list[Side] = [
                BareSide("bare", bare),
                StreamSide("stream", server, client),
                HttpSide("/score", http, address, VLLM_SCORE),
                HttpSide("/rerank", http, address, VLLM_RERANK),
            ]
            found = _contest(bench, sides, _VLLM_SECONDS[model])
        figures.append(
            Figure(f"{title}: stream / bare engine", found.ratio("stream", "bare"), "x", _BARE_TARGET[model])
        )
        for path_of_url, target in zip(("/score", "/rerank"), _HTTP_TARGETS[model], strict=True):
            name = f"vLLM HTTP {path_of_url}"
            figures.append(Figure(f"{title}: stream / {name}", found.ratio("stream", path_of_url), "x", target))
            # The upper bound of the figure above: no service around this engine can be faster than the engine.
            figures.append(Figure(f"{title}: bare engine / {name}", found.ratio("bare", path_of_url)))
        figures.append(Figure(f"{title}: stream", found.rate("stream"), "pairs/s"))
        if model == "tiny":
            # The same server is used again, because it takes long to start.
            server.resume()
            figures += interactive_latency(bench, server, title)
    return figures


def _contest(bench: Bench, sides: list[Side], seconds: float) -> Contest:
    found = contest(
        sides,
        lambda queries: bench.corpus.grid(queries, DOCUMENTS),
        rounds=bench.rounds,
        seconds=seconds * bench.scale,
        tolerance=bench.score_tolerance,
        say=bench.say,
    )
    queries = f"{min(found.queries)} to {max(found.queries)}"
    bench.say(f"{queries} x {DOCUMENTS} pairs a round; raw scores differ by at most {found.difference:.1e}")
    return found


@contextmanager
def _channel(address: str) -> Iterator[grpc.Channel]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=unlimited) as channel:
        yield channel
