"""Number formats: errors of scores in 16 bits, and the share of masks that flip, for each shape, engine and format."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu import shapes
from benchmarks.gpu.pairs import PairSource, real_grid, training_texts, words
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.sides import EngineSide, PredictSide, Side, missing
from benchmarks.texts import Grid

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
    def of(
        cls, shape: str, side: str, scores: NDArray[np.float32], exact: NDArray[np.float32], cosines: bool = False
    ) -> Errors:
        """Compare raw scores, shape ``(n, n)``, with the own documents' scores on the diagonal."""
        apart = np.abs(scores - exact)
        wanted, found = _masks(exact, cosines), _masks(scores, cosines)
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


def _masks(raw: NDArray[np.float32], cosines: bool) -> dict[float, NDArray[np.bool_]]:
    """Masks of the negatives for each margin, as the loss makes them: above the positive's probability - margin."""
    exact = raw.astype(np.float64)
    probabilities = (1 + exact) / 2 if cosines else 1 / (1 + np.exp(-exact))
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


class ScoredSide:
    """An engine of ours with tokenizing and scheduler, without RPCs; for models of every kind."""

    weights: int | None = None

    def __init__(self, model: Path, engine: str, dtype: str) -> None:
        from reranker_service.loading import make_engine
        from reranker_service.models import make_layout, read_model
        from reranker_service.scheduling import Scheduler
        from reranker_service.scoring import Scorer
        from reranker_service.settings import Settings

        spec = read_model(str(model))
        settings = Settings(model=str(model), engine=engine, dtype=dtype)
        self._runner = asyncio.Runner()
        self._engine = make_engine(settings, spec)
        self._runner.run(self._engine.start())
        self._scorer = self._runner.run(_call(lambda: Scorer(spec, make_layout(spec), Scheduler(self._engine))))
        self.name = f"{engine} engine {dtype}"

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        from reranker_service.scheduling import Ticket
        from reranker_service.scoring import Pairs, TextTable

        rows, columns = len(grid.queries), len(grid.documents)
        options = replace(self._scorer.ranges.defaults, raw=True)
        table = TextTable(options, Ticket("formats", interactive=False), [*grid.queries, *grid.documents])
        began = time.perf_counter()
        try:
            pairs = Pairs(np.arange(rows), np.arange(columns) + rows, grid=True)
            scores = self._runner.run(self._scorer.score(table, pairs)).scores
        finally:
            table.close()
        return time.perf_counter() - began, scores.reshape(rows, columns)

    def close(self) -> None:
        """See ``Side.close``."""
        self._runner.run(_call(self._scorer.close))
        self._runner.run(self._engine.close())
        self._runner.close()


async def _call(make: Callable[[], Any]) -> Any:
    """Call a function inside an event loop."""
    return make()


def measure_trained(
    models: Sequence[Path], *, rows: int, engines: Sequence[str], say: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each trained model, engine and format, on real pairs; see ``measure``.

    The reference is our torch engine in float32, which the tests compare with sentence-transformers.
    """
    from reranker_service.models import read_model

    grid = real_grid(rows)
    for model in models:
        cosines = read_model(str(model)).kind == "bi-encoder"
        exact: NDArray[np.float32] | None = None
        for engine in engines:
            if engine == "vllm" and missing("vllm"):
                continue
            for dtype in DTYPES:
                side = ScoredSide(model, engine, dtype)
                try:
                    scores = side.score(grid)[1]
                finally:
                    side.close()
                exact = scores if exact is None else exact
                errors = Errors.of(model.name, side.name, scores, exact, cosines)
                say(f"{model.name}, {side.name}: largest {errors.largest:.2g}, flipped {errors.flipped}")
                yield {**asdict(errors), "trained": True}


def _makers(shape: Shape, model: Path, device: torch.device, engines: Sequence[str]) -> Iterator[Callable[[], Side]]:
    for dtype in DTYPES:
        yield lambda dtype=dtype: PredictSide(model, shape.family, dtype, device)  # type: ignore[misc]
    for engine in engines:
        if missing("engine") or (engine == "vllm" and missing("vllm")):
            continue
        for dtype in DTYPES:
            yield lambda engine=engine, dtype=dtype: EngineSide(model, engine, dtype)  # type: ignore[misc]
