"""Number formats: errors of scores in 16 bits, and the share of masks that flip, for each shape, engine and format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu import shapes
from benchmarks.gpu.pairs import PairSource, training_texts, words
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.sides import EngineSide, PredictSide, Side, missing

MARGINS = (0.0, 0.02, 0.05, 0.1)
"""Margins of the loss, in units of probability."""
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Errors:
    """Difference of one side's scores from ``CrossEncoder.predict`` in float32.

    Attributes:
        shape: The model.
        side: The side, with its format.
        spread: Standard deviation of the raw scores in float32.
        largest: Largest difference of a raw score.
        mean: Mean difference.
        ties: Share of the rows' neighbours in the order of scores that have equal scores.
        flipped: For each margin, the share of the negatives whose mask is another one than in float32.
        masked: For each margin, the share of the negatives that are masked in float32.
    """

    shape: str
    side: str
    spread: float
    largest: float
    mean: float
    ties: float
    flipped: dict[str, float]
    masked: dict[str, float]

    @classmethod
    def of(cls, shape: str, side: str, scores: NDArray[np.float32], exact: NDArray[np.float32]) -> Errors:
        """Compare raw scores, shape ``(n, n)``, with the own documents' scores on the diagonal."""
        apart = np.abs(scores - exact)
        wanted, found = _masks(exact), _masks(scores)
        return cls(
            shape=shape,
            side=side,
            spread=float(exact.std()),
            largest=float(apart.max()),
            mean=float(apart.mean()),
            ties=float((np.diff(np.sort(scores, axis=1), axis=1) == 0).mean()),
            flipped={str(margin): float((found[margin] != wanted[margin]).mean()) for margin in MARGINS},
            masked={str(margin): float(wanted[margin].mean()) for margin in MARGINS},
        )


def _masks(raw: NDArray[np.float32]) -> dict[float, NDArray[np.bool_]]:
    """Masks of the negatives for each margin, as the loss makes them: above the positive's probability - margin."""
    probabilities = 1 / (1 + np.exp(-raw.astype(np.float64)))
    negatives = ~np.eye(len(raw), dtype=bool)
    limits = probabilities.diagonal()[:, None]
    return {margin: (probabilities > limits - margin)[negatives] for margin in MARGINS}


def measure(
    chosen: Sequence[Shape], device: torch.device, *, rows: int, engines: Sequence[str], say: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each shape, side and format.

    Args:
        chosen: The shapes.
        device: The device of ``CrossEncoder``; engines take the first GPU if there is one.
        rows: Anchors, and documents, of the scored grid.
        engines: "torch" and "vllm"; those whose packages are missing are left out.
        say: Prints one line of progress.
    """
    source = words()
    texts = training_texts(source)
    for shape in chosen:
        with tempfile.TemporaryDirectory(prefix="reranker-formats-") as directory:
            model = Path(directory)
            tokenizer = shapes.build(shape, model, texts, torch.float32, device)
            room = shapes.MAX_TOKENS - (160 if shape.family == "qwen3" else 30)
            grid = PairSource(source, tokenizer, room).grid(rows, rows)
            exact: NDArray[np.float32] | None = None
            for make in _makers(shape, model, device, engines):
                side = make()
                try:
                    scores = side.score(grid)[1]
                finally:
                    side.close()
                exact = scores if exact is None else exact
                errors = Errors.of(shape.name, side.name, scores, exact)
                say(f"{shape.name}, {side.name}: largest {errors.largest:.2g}, flipped {errors.flipped}")
                yield asdict(errors)


def _makers(shape: Shape, model: Path, device: torch.device, engines: Sequence[str]) -> Iterator[Callable[[], Side]]:
    for dtype in DTYPES:
        yield lambda dtype=dtype: PredictSide(model, shape.family, dtype, device)  # type: ignore[misc]
    for engine in engines:
        if missing("engine") or (engine == "vllm" and missing("vllm")):
            continue
        for dtype in DTYPES:
            yield lambda engine=engine, dtype=dtype: EngineSide(model, engine, dtype)  # type: ignore[misc]
