"""Sides of the benchmark on a GPU: each scores a grid with one model and measures the time."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.shapes import MAX_TOKENS, Family
from benchmarks.texts import Grid

BATCH_SIZES = (32, 128, 512)
"""Batch sizes of ``CrossEncoder.predict`` that are tried; its default is 32."""
_CHUNK_PAIRS = 1024
_TIMEOUT = 300.0
_SERVER_NEEDS = ("grpc", "grpc_health", "grpc_reflection", "structlog", "pydantic_settings", "lmdb", "reranker")
_ENGINE_NEEDS = ("structlog",)


class Side(Protocol):
    """One way to score pairs.

    Attributes:
        name: Name in the table.
        weights: Bytes of GPU memory of the weights; ``None`` for a model in another process.
    """

    name: str
    weights: int | None

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """Score a grid; return the seconds that it took and the raw scores, shape ``(Q, D)``."""

    def close(self) -> None:
        """Free the model."""


def missing(side: Literal["engine", "stream", "vllm"]) -> list[str]:
    """Packages that a side needs and that are not installed."""
    needs = {"engine": _ENGINE_NEEDS, "stream": _SERVER_NEEDS, "vllm": (*_ENGINE_NEEDS, "vllm")}[side]
    return [name for name in needs if importlib.util.find_spec(name) is None]


class PredictSide:
    """``CrossEncoder.predict`` of sentence-transformers at the best of several batch sizes, tokenizing included."""

    def __init__(self, model: Path, family: Family, dtype: str, device: torch.device) -> None:
        from sentence_transformers import CrossEncoder

        before = allocated()
        options = {"dtype": getattr(torch, dtype)}
        self._model = CrossEncoder(str(model), device=str(device), model_kwargs=options, local_files_only=True)
        self._model.max_length = MAX_TOKENS
        self.weights: int | None = allocated() - before
        self._family = family
        self.batch_size = BATCH_SIZES[0]
        self.name = f"CrossEncoder.predict {dtype}"

    def choose(self, grid: Grid) -> dict[int, float]:
        """Take the fastest batch size for a grid's pairs; return the pairs a second of each."""
        rates = {}
        for self.batch_size in BATCH_SIZES:
            try:
                rates[self.batch_size] = grid.pairs / min(self.score(grid)[0] for _ in range(2))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        self.batch_size = max(rates, key=lambda size: rates[size])
        self.name = f"{self.name}, batch {self.batch_size}"
        return rates

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        began = time.perf_counter()
        pairs = [self._pair(query, document) for query in grid.queries for document in grid.documents]
        raw = self._model.predict(
            pairs, batch_size=self.batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False
        )
        seconds = time.perf_counter() - began
        return seconds, np.asarray(raw, dtype=np.float32).reshape(len(grid.queries), len(grid.documents))

    def _pair(self, query: str, document: str) -> tuple[str, str]:
        if self._family != "qwen3":
            return query, document
        from reranker_service.models.families import QWEN3_RERANKER

        # As the model card of the one-label conversions does it.
        template = QWEN3_RERANKER.template
        head = template.prefix[0] + template.opening(None)
        return f"{head} {query}{template.query[1]}", f" {document}{template.suffix[0]}"

    def close(self) -> None:
        """See ``Side.close``."""
        del self._model
        _free()


class EngineSide:
    """An engine of ours without server: time of the engine alone, for inputs that are tokenized and joined before."""

    def __init__(self, model: Path, engine: Literal["torch", "vllm"], dtype: str) -> None:
        from benchmarks.bare import make_engine, pair_layout
        from reranker_service.models import read_model

        before = allocated()
        self._spec = read_model(str(model))
        self._layout = pair_layout(self._spec)
        self._runner = asyncio.Runner()
        self._engine = make_engine(
            self._spec, engine, dtype, {"gpu_memory_utilization": 0.3} if engine == "vllm" else {}
        )
        self._runner.run(self._engine.start())
        self.weights: int | None = allocated() - before if engine == "torch" else None
        self.choices = self._engine.choices()
        self.name = f"{engine} engine {dtype}"

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        from benchmarks.bare import encode_grid

        length = min(self._spec.default_length, MAX_TOKENS)
        sequences = encode_grid(self._layout, list(grid.queries), list(grid.documents), length)
        began = time.perf_counter()
        raw = self._runner.run(self._run(sequences))
        return time.perf_counter() - began, raw.reshape(len(grid.queries), len(grid.documents))

    async def _run(self, sequences: Sequence[Any]) -> NDArray[np.float32]:
        """Run sequences as the scheduler does: longest first, two batches in the engine."""
        engine = self._engine
        if engine.batch_tokens is None:
            return await engine.run(sequences)
        order = sorted(range(len(sequences)), key=lambda position: -len(sequences[position].ids))
        batches = []
        while order:
            most = max(engine.batch_tokens // len(sequences[order[0]].ids), 1)
            batches.append(order[: min(most, engine.max_batch)])
            order = order[len(batches[-1]) :]
        scores = np.empty(len(sequences), dtype=np.float32)
        room = asyncio.Semaphore(2)

        async def run(batch: list[int]) -> None:
            async with room:
                scores[batch] = await engine.run([sequences[position] for position in batch])

        await asyncio.gather(*(run(batch) for batch in batches))
        return scores

    def close(self) -> None:
        """See ``Side.close``."""
        self._runner.run(self._engine.close())
        self._runner.close()
        _free()


class StreamSide:
    """``RerankStream`` of a server of ours in another process, called through the client that training code uses."""

    def __init__(self, model: Path, engine: Literal["torch", "vllm"], dtype: str, log: Path) -> None:
        from examples.serving import reranker_server
        from loss_client import RerankerClient

        flags = ["--model", str(model), "--dtype", dtype, "--cache-bytes", "0"]
        if engine == "vllm":
            flags += ["--engine-args", '{"gpu_memory_utilization": 0.3}']
        self._stack = ExitStack()
        server = self._stack.enter_context(reranker_server(log, engine, flags))
        self._client = self._stack.enter_context(RerankerClient(server.wait_ready(), timeout=_TIMEOUT))
        self.weights: int | None = None
        self.name = f"stream, {engine} engine {dtype}"

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        began = time.perf_counter()
        matrix = self._client.stream_grid(
            grid.queries,
            grid.documents,
            score_type="raw",
            max_length=MAX_TOKENS,
            chunk_pairs=_CHUNK_PAIRS,
            timeout=_TIMEOUT,
        )
        scores = matrix.result()
        return time.perf_counter() - began, scores

    def close(self) -> None:
        """See ``Side.close``."""
        self._stack.close()


def allocated(peak: bool = False) -> int:
    """Bytes of GPU memory that tensors of this process hold, or have held at most since the last reset."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def _free() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
