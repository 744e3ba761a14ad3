"""Worker process for the baselines: an engine without a server, or ``CrossEncoder.predict``.

The worker scores grids on request over a loopback connection and returns the scoring time that it measured itself. So
the time excludes the connection and, for an engine, tokenizing.
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
"""Maps queries and documents to the scoring time in seconds and the raw scores of their grid, row-major."""


def make_engine(spec: ModelSpec, name: str, dtype: str, engine_args: dict[str, Any]) -> Engine:
    """Make an engine with the server's default settings."""
    if name == "torch":
        from reranker_service.engines.torch_engine import TorchEngine

        return TorchEngine(spec, dtype=dtype)
    from reranker_service.engines.vllm_engine import VllmEngine

    return VllmEngine(spec, dtype=dtype, engine_args=engine_args)


def pair_layout(spec: ModelSpec) -> PairLayout:
    """Return the input layout of a model that reads query and document together."""
    layout = make_layout(spec)
    assert isinstance(layout, PairLayout)
    return layout


def encode_grid(layout: PairLayout, queries: list[str], documents: list[str], max_length: int) -> list[TokenSequence]:
    """Return the model's token sequences for a grid, row-major."""
    left, right = layout.encode_queries(queries, None), layout.encode_documents(documents)
    pairs = [(query, document) for query in left for document in right]
    return layout.join([query for query, _ in pairs], [document for _, document in pairs], max_length)


async def run_sorted(engine: Engine, sequences: list[TokenSequence]) -> NDArray[np.float32]:
    """Run an engine on sequences; an engine that pads gets batches sorted by length, longest first, within its limits.

    Returns:
        The scores in the order of ``sequences``.
    """
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
    """Answer the requests of one client until the client disconnects."""
    host, port = listener.address[:2]
    # One write for the whole line, because other processes may write to the same pipe.
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
    """Run the worker until its client disconnects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--side", choices=("torch", "vllm", "predict"), required=True, help="scorer to run")
    parser.add_argument("--dtype", default="auto", help="number format of the engine")
    parser.add_argument("--engine-args", default="{}", help="arguments of vLLM, as a JSON object")
    arguments = parser.parse_args()
    with Listener(("127.0.0.1", 0)) as listener:
        (_with_cross_encoder if arguments.side == "predict" else _with_engine)(arguments, listener)


if __name__ == "__main__":
    main()
