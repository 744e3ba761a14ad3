"""Measures the sides of one shape on the same grids, in turn, and records the results."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu import shapes
from benchmarks.gpu.pairs import PairSource, training_texts, words
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.sides import EngineSide, PredictSide, Side, StreamSide, allocated, missing
from benchmarks.rounds import Spread
from benchmarks.texts import Grid

ROUNDS = 3
_WARM_QUERIES = 8


@dataclass(frozen=True, slots=True)
class Machine:
    """The device that all sides run on.

    Attributes:
        device: The GPU, or the CPU in a rehearsal.
        name: Its name.
        peak: Floating-point operations a second of a large matrix product in bfloat16, measured in this run; 0 on a
            CPU.
    """

    device: torch.device
    name: str
    peak: float

    @classmethod
    def here(cls) -> Machine:
        """The first GPU, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return cls(torch.device("cpu"), "CPU", 0.0)
        return cls(torch.device("cuda", 0), torch.cuda.get_device_name(0), _peak())


def _peak() -> float:
    size, times = 8192, []
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        left @ right
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return 2 * size**3 / float(np.median(times[5:]))


def operations(shape: Shape, lengths: NDArray[np.int64]) -> float:
    """Floating-point operations of the model for inputs of some lengths in tokens: matrix products and attention."""
    c = shape.config
    hidden, layers, wide = c["hidden_size"], c["num_hidden_layers"], c["intermediate_size"]
    size = c.get("head_dim", hidden // c["num_attention_heads"])
    queries, keys = c["num_attention_heads"] * size, c.get("num_key_value_heads", c["num_attention_heads"]) * size
    # Gated layers have three matrices, others two.
    matrices = hidden * (2 * queries + 2 * keys) + hidden * wide * (2 if shape.family in ("bert", "xlm-roberta") else 3)
    attention = 4 * queries * lengths.astype(np.float64) ** 2  # query by key, and weights by value
    if shape.family == "qwen3":
        attention /= 2
    full = layers
    if shape.family == "modernbert":
        full = -(-layers // 3)
        local = 4 * queries * lengths * np.minimum(lengths, 128)
        attention = (full * attention + (layers - full) * local) / layers
    return float((2.0 * matrices * lengths + attention).sum() * layers)


@dataclass(slots=True)
class Result:
    """Measurements of one side.

    Attributes:
        rates: Pairs a second of each round.
        memory: Bytes of GPU memory, of the weights and of the largest batch; ``None`` for a model in another process.
        difference: Largest difference of a raw score from ``CrossEncoder.predict`` in the same format.
    """

    rates: list[float]
    memory: int | None = None
    difference: float = 0.0


class Benchmark:
    """One run of the benchmark.

    Args:
        machine: The device.
        output: Directory for results and logs.
        say: Prints one line of progress.
        rehearsal: Whether models are tiny.
        rounds: Rounds behind every figure.
    """

    def __init__(
        self, machine: Machine, output: Path, say: Callable[[str], object], rehearsal: bool, rounds: int = ROUNDS
    ) -> None:
        self.machine = machine
        self._output = output
        self._say = say
        self._rehearsal = rehearsal
        self._rounds = rounds
        output.mkdir(parents=True, exist_ok=True)
        self._words = words()
        self._texts = training_texts(self._words)

    def measure(self, shape: Shape, dtypes: Sequence[str], engines: Sequence[str]) -> list[dict[str, Any]]:
        """Measure one shape; append its records to ``gpu.jsonl``, one a side.

        Args:
            shape: The shape.
            dtypes: Number formats.
            engines: Engines to measure, "torch" and "vllm"; those whose packages are missing are left out.
        """
        records = []
        if self._rehearsal:
            shape = shapes.tiny(shape)
        for dtype in dtypes:
            with tempfile.TemporaryDirectory(prefix="reranker-gpu-") as directory:
                began = time.monotonic()
                model = Path(directory)
                tokenizer = shapes.build(shape, model, self._texts, getattr(torch, dtype), self.machine.device)
                room = shapes.MAX_TOKENS - (160 if shape.family == "qwen3" else 30)
                source = PairSource(self._words, tokenizer, room)
                self._say(f"{shape.name}, {dtype}: model made in {time.monotonic() - began:.0f} s")
                with ExitStack() as stack:
                    sides = self._sides(stack, shape, model, dtype, engines)
                    grids, tokens = self._grids(shape, source, tokenizer)
                    found = self._contest(sides, source, grids)
            cost = float(np.mean([operations(shape, lengths) / len(lengths) for lengths in tokens]))
            for name, result in found.items():
                rate = Spread.of(result.rates)
                record = {
                    "shape": shape.name,
                    "dtype": dtype,
                    "side": name,
                    "device": self.machine.name,
                    "pairs_per_second": round(rate.value, 1),
                    "low": round(rate.low, 1),
                    "high": round(rate.high, 1),
                    "share_of_peak": round(rate.value * cost / self.machine.peak, 4) if self.machine.peak else None,
                    "memory_bytes": result.memory,
                    "largest_difference": result.difference,
                    "tokens_per_pair": round(float(np.mean(np.concatenate(tokens))), 1),
                    "pairs": grids[0].pairs,
                    "rehearsal": self._rehearsal,
                }
                records.append(record)
                with (self._output / "gpu.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        return records

    def _sides(self, stack: ExitStack, shape: Shape, model: Path, dtype: str, engines: Sequence[str]) -> list[Side]:
        sides: list[Side] = [PredictSide(model, shape.family, dtype, self.machine.device)]
        for engine in engines:
            lacking = missing("engine") + (missing("vllm") if engine == "vllm" else [])
            if lacking:
                self._say(f"{engine} engine left out: {', '.join(dict.fromkeys(lacking))} not installed")
                continue
            try:
                sides.append(EngineSide(model, engine, dtype))  # type: ignore[arg-type]
                self._say(f"{engine} engine: {sides[-1].choices}")  # type: ignore[attr-defined]
                lacking = missing("stream")
                if lacking:
                    self._say(f"stream over {engine} left out: {', '.join(lacking)} not installed")
                    continue
                sides.append(StreamSide(model, engine, dtype, self._output / f"{shape.name}-{engine}.log"))  # type: ignore[arg-type]
            except Exception as error:  # the other sides' figures are worth having
                self._say(f"{engine}: {type(error).__name__}: {str(error)[-1500:]}")
        for side in sides:
            stack.callback(side.close)
        return sides

    def _grids(self, shape: Shape, source: PairSource, tokenizer: Any) -> tuple[list[Grid], list[NDArray[np.int64]]]:
        """A grid for each round, and the tokens of each pair."""
        documents = 16 if self._rehearsal else 256
        grids = [source.grid(max(shape.pairs // documents, 1), documents) for _ in range(self._rounds)]

        def lengths(texts: Sequence[str]) -> NDArray[np.int64]:
            return np.array([len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]])

        special = 90 if shape.family == "qwen3" else 3
        return grids, [
            np.minimum(
                (lengths(grid.queries)[:, None] + lengths(grid.documents)[None] + special).ravel(), shapes.MAX_TOKENS
            )
            for grid in grids
        ]

    def _contest(self, sides: Sequence[Side], source: PairSource, grids: Sequence[Grid]) -> dict[str, Result]:
        warm = source.grid(min(_WARM_QUERIES, len(grids[0].queries)), len(grids[0].documents))
        for side in sides:
            if isinstance(side, PredictSide):
                rates = side.choose(warm)
                self._say(
                    f"predict at batch sizes: {', '.join(f'{size}: {rate:,.0f}' for size, rate in rates.items())}"
                )
            else:
                for _ in range(2):
                    side.score(warm)
        found = {side.name: Result([]) for side in sides}
        for number, grid in enumerate(grids):
            reference: NDArray[np.float32] | None = None
            for side in sides:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                before = allocated()
                seconds, scores = side.score(grid)
                result = found[side.name]
                result.rates.append(grid.pairs / seconds)
                result.memory = None if side.weights is None else side.weights + allocated(peak=True) - before
                if reference is None:
                    reference = scores
                result.difference = max(result.difference, float(np.abs(scores - reference).max()))
            line = ", ".join(f"{name} {result.rates[-1]:,.0f}" for name, result in found.items())
            self._say(f"round {number + 1}, pairs/s: {line}")
        return found
