"""Pairs a second: our RPCs against the bare engine, against vLLM's own HTTP server and against plain services."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import grpc

from benchmarks.bench import Bench
from benchmarks.http_sides import BASELINE, VLLM_RERANK, VLLM_SCORE, HttpSide
from benchmarks.launch import address_of, http_address_of
from benchmarks.report import Figure
from benchmarks.rounds import DOCUMENTS, Contest, Side, contest
from benchmarks.sides import BareSide, BatchSide, StreamSide, UnarySide
from loss_client import RerankerClient

_TORCH_SECONDS = {"minilm": 80.0, "tiny": 30.0}
_VLLM_SECONDS = {"minilm": 105.0, "tiny": 55.0}
_BARE_TARGET = {"minilm": 0.97, "tiny": 0.9}
_HTTP_TARGETS = {"minilm": (1.05, 1.3), "tiny": (1.5, 2.0)}


def on_torch(bench: Bench, model: str) -> list[Figure]:
    """The torch engine, all our RPCs, ``CrossEncoder.predict`` and the plain HTTP baseline.

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
        sides: list[Side] = [
            BareSide("bare", bare),
            StreamSide("stream", server, client),
            BareSide("predict", predict),
            stack.enter_context(closing(HttpSide("plain", plain, address_of(plain), BASELINE))),
        ]
        if model == "tiny":
            # Where overhead shows: also the other RPCs.
            sides += [UnarySide("unary", server, channel), BatchSide("batch", server, channel)]
        found = _contest(bench, sides, _TORCH_SECONDS[model])
    title = f"torch, {model}"
    figures = [
        Figure(f"{title}: stream / bare engine", found.ratio("stream", "bare"), "x", _BARE_TARGET[model]),
        Figure(f"{title}: stream / CrossEncoder.predict", found.ratio("stream", "predict")),
        Figure(f"{title}: stream / plain HTTP service", found.ratio("stream", "plain")),
    ]
    if model == "tiny":
        figures.append(Figure(f"{title}: unary / bare engine", found.ratio("unary", "bare")))
        figures.append(Figure(f"{title}: batch / bare engine", found.ratio("batch", "bare")))
    return [*figures, Figure(f"{title}: stream", found.rate("stream"), "pairs/s")]


def on_vllm(bench: Bench, model: str) -> list[Figure]:
    """The vLLM engine, our stream, and vLLM's own HTTP server.

    Args:
        bench: The run.
        model: "minilm" or "tiny".
    """
    path = bench.models[model]
    with ExitStack() as stack:
        server = stack.enter_context(bench.launcher.server(path, "vllm"))
        bare = stack.enter_context(bench.launcher.bare(path, "vllm"))
        http = stack.enter_context(bench.launcher.vllm_http(path))
        client = stack.enter_context(RerankerClient(address_of(server)))
        address = http_address_of(http)
        sides: list[Side] = [
            BareSide("bare", bare),
            StreamSide("stream", server, client),
            stack.enter_context(closing(HttpSide("/score", http, address, VLLM_SCORE))),
            stack.enter_context(closing(HttpSide("/rerank", http, address, VLLM_RERANK))),
        ]
        found = _contest(bench, sides, _VLLM_SECONDS[model])
    title = f"vllm, {model}"
    score_target, rerank_target = _HTTP_TARGETS[model]
    return [
        Figure(f"{title}: stream / bare engine", found.ratio("stream", "bare"), "x", _BARE_TARGET[model]),
        Figure(f"{title}: stream / vLLM HTTP /score", found.ratio("stream", "/score"), "x", score_target),
        Figure(f"{title}: stream / vLLM HTTP /rerank", found.ratio("stream", "/rerank"), "x", rerank_target),
        Figure(f"{title}: stream", found.rate("stream"), "pairs/s"),
    ]


def _contest(bench: Bench, sides: list[Side], seconds: float) -> Contest:
    found = contest(
        sides,
        lambda queries: bench.corpus.grid(queries, DOCUMENTS),
        rounds=bench.rounds,
        seconds=seconds * bench.scale,
        say=bench.say,
    )
    bench.say(f"{found.queries} x {DOCUMENTS} pairs a round; raw scores differ by at most {found.difference:.1e}")
    return found


@contextmanager
def _channel(address: str) -> Iterator[grpc.Channel]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=unlimited) as channel:
        yield channel
