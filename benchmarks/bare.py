"""What a service is measured against: the engine alone, on ready token ids, and ``CrossEncoder.predict``.

A worker process that holds one of them and scores grids on request, over a loopback connection: it says how long the
scoring took by its own clock, so neither tokenizing (for an engine) nor the connection counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reranker_service.engines import Engine
from reranker_service.models import ModelSpec, PairLayout, TokenSequence, make_layout, read_model

Score = Callable[[list[str], list[str]], tuple[float, NDArray[np.float32]]]
"""Queries and documents to seconds and raw scores of the grid, row-major."""


def make_engine(spec: ModelSpec, name: str, dtype: str, engine_args: dict[str, Any]) -> Engine:
    """The engine as the server makes it where nothing is configured."""
    if name == "torch":
        from reranker_service.engines.torch_engine import TorchEngine

        return TorchEngine(spec, dtype=dtype)
    from reranker_service.engines.vllm_engine import VllmEngine

    return VllmEngine(spec, dtype=dtype, engine_args=engine_args)


def pair_layout(spec: ModelSpec) -> PairLayout:
    """The layout of a model that reads pairs."""
    layout = make_layout(spec)
    assert isinstance(layout, PairLayout)
    return layout


def encode_grid(layout: PairLayout, queries: list[str], documents: list[str], max_length: int) -> list[TokenSequence]:
    """The model's inputs for a grid, row-major."""
    left, right = layout.encode_queries(queries, None), layout.encode_documents(documents)
    pairs = [(query, document) for query in left for document in right]
    return layout.join([query for query, _ in pairs], [document for _, document in pairs], max_length)


async def run_sorted(engine: Engine, sequences: list[TokenSequence]) -> NDArray[np.float32]:
    """Run an engine by hand: where it pads, in batches of like length within its limits, the longest first."""
    if engine.batch_tokens is None:
        return await engine.run(sequences)
    order = sorted(range(len(sequences)), key=lambda position: -len(sequences[position].ids))
    scores = np.empty(len(sequences), dtype=np.float32)
    while order:
        longest = len(sequences[order[0]].ids)
        batch = order[: min(max(engine.batch_tokens // longest, 1), engine.max_batch)]
        scores[batch] = await engine.run([sequences[position] for position in batch])
        order = order[len(batch) :]
    return scores


def serve(listener: Listener, score: Score) -> None:
    """Answer requests of one client until it hangs up."""
    host, port = listener.address[:2]
    # In one piece: other processes may write to the same pipe.
    print(f"event=ready address={host}:{port}\n", end="", flush=True)
    with listener.accept() as connection:
        while True:
            try:
                request = json.loads(connection.recv_bytes())
            except EOFError:
                return
            seconds, scores = score(request["queries"], request["documents"])
            _reply(connection, seconds, scores)


def _reply(connection: Connection, seconds: float, scores: NDArray[np.float32]) -> None:
    connection.send_bytes(json.dumps({"seconds": seconds, "scores": scores.tolist()}).encode())


def _with_engine(arguments: argparse.Namespace, listener: Listener) -> None:
    spec = read_model(str(arguments.model))
    layout = pair_layout(spec)
    engine = make_engine(spec, arguments.side, arguments.dtype, json.loads(arguments.engine_args))
    with asyncio.Runner() as runner:
        runner.run(engine.start())

        def score(queries: list[str], documents: list[str]) -> tuple[float, NDArray[np.float32]]:
            sequences = encode_grid(layout, queries, documents, spec.default_length)
            began = time.perf_counter()
            raw = runner.run(run_sorted(engine, sequences))
            return time.perf_counter() - began, raw

        try:
            serve(listener, score)
        finally:
            runner.run(engine.close())


def _with_cross_encoder(arguments: argparse.Namespace, listener: Listener) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(arguments.model), local_files_only=True)
    if torch.cuda.is_available():
        model.bfloat16()

    def score(queries: list[str], documents: list[str]) -> tuple[float, NDArray[np.float32]]:
        pairs = [(query, document) for query in queries for document in documents]
        began = time.perf_counter()
        raw = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return time.perf_counter() - began, np.asarray(raw, dtype=np.float32)

    serve(listener, score)


def main() -> None:
    """Run the worker until its client hangs up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--side", choices=("torch", "vllm", "predict"), required=True, help="what scores")
    parser.add_argument("--dtype", default="auto", help="number format")
    parser.add_argument("--engine-args", default="{}", help="arguments for vLLM, as JSON")
    arguments = parser.parse_args()
    with Listener(("127.0.0.1", 0)) as listener:
        (_with_cross_encoder if arguments.side == "predict" else _with_engine)(arguments, listener)


if __name__ == "__main__":
    main()
