"""Benchmark of ``top_p`` alone: share of pairs scored, and effect of the unscored pairs on loss and gradient.

Batches of real texts are embedded once, and the loss is calculated from the embeddings. Scores come from a guide in
this process, so the figures depend on the choice of pairs alone and not on a server. The guide's score is the mean of
two cosines, of all-MiniLM's embeddings and of TF-IDF vectors: like a reranker, it agrees with the model on most pairs,
but not on all.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional

from benchmarks.bench import Bench
from benchmarks.report import Figure, save_svg
from benchmarks.rounds import Spread
from examples.docstrings import PACKAGES, collect, text_key
from examples.student import load_minilm, load_student
from loss_client import RerankerCachedGISTEmbedLoss, ScoreUsage
from loss_client.client.scores import RawScale
from loss_client.filter.candidates import Candidates
from loss_client.filter.statistics import LossStatistics

BATCHES = (256, 1024, 4096)
TEMPERATURES = (0.01, 0.02, 0.05)
TOP_P = 0.999
_QUICK_BATCHES = (64,)
_QUICK_TEMPERATURES = (0.01, 0.05)
_QUICK_PACKAGES = ("numpy",)
# Of a full batch, with the choice of candidates. No target for small batches, whose steps are short.
_TIME_TARGET = 2.0
_TIME_TARGET_BATCH = 1024
_SHARE_TARGET = {("minilm", 1024, 0.01): 0.01}
_MINI_BATCH = 64
_TOPICS = 256  # dimensions of the TF-IDF vectors


class _Scores:
    """Scores that are complete from the start; implements ``ScoreRows``."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._values = values
        self.shape = values.shape[0], values.shape[1]
        self.wait_seconds = 0.0
        self.usage = ScoreUsage()
        self.error = None
        self.span = (0.0, 0.0)

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        return self._values[begin:end]

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        return self._values[begin:end]

    def release(self, begin: int, end: int) -> None:
        """Do nothing: the scores stay in memory."""

    def cancel(self) -> None:
        """Do nothing: no job is in flight."""


class Guide:
    """Scores pairs in this process by the cosine of given vectors; implements ``ScoringClient``.

    Args:
        vectors: Vector of unit length for each text.

    Attributes:
        seconds: Total scoring time so far.
    """

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        self._place = {text: place for place, text in enumerate(vectors)}
        self._vectors = torch.stack(list(vectors.values()))  # (texts, dim)
        self.seconds = 0.0

    def stream_grid(self, queries: Sequence[str], documents: Sequence[str], **options: Any) -> _Scores:
        """See ``ScoringClient``."""
        began = time.perf_counter()
        scores = _Scores((self._of(queries) @ self._of(documents).T).numpy())
        self.seconds += time.perf_counter() - began
        return scores

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        **options: Any,
    ) -> _Scores:
        """See ``ScoringClient``."""
        began = time.perf_counter()
        grid = self._of(queries) @ self._of(documents).T  # one matrix product is faster than a product for each pair
        scores = _Scores(grid.numpy()[query_ids, document_ids][:, None])
        self.seconds += time.perf_counter() - began
        return scores

    def raw_scale(self, timeout: float | None) -> RawScale:
        """See ``ScoringClient``."""
        return "cosine"

    def _of(self, texts: Sequence[str]) -> Tensor:
        return self._vectors[[self._place[text] for text in texts]]


@dataclass(frozen=True, slots=True)
class Calculation:
    """One calculation of the loss from embeddings.

    Attributes:
        loss: Mean loss of the batch.
        gradients: Gradients with respect to the embeddings of anchors and positives, shape ``(2, batch, dim)``.
        seconds: Time of the calculation with its gradients, without the scoring.
        statistics: Counts of the filter.
    """

    loss: float
    gradients: Tensor
    seconds: float
    statistics: LossStatistics


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of ``candidates="nearest"``, ``top_p`` alone, with ``candidates="all"`` (the full loss) on one batch.

    Attributes:
        share: Pairs scored / all pairs.
        rounds: Number of times that scores were requested.
        loss: Loss - full loss.
        gradient: Norm of (gradient - full gradient) / norm of the full gradient.
        seconds: Time of the calculation / time of the full calculation.
    """

    share: float
    rounds: int
    loss: float
    gradient: float
    seconds: float

    @classmethod
    def of(cls, some: Calculation, full: Calculation) -> Comparison:
        """Compare two calculations of one batch."""
        difference = torch.linalg.vector_norm(some.gradients - full.gradients)
        return cls(
            share=some.statistics.pairs / full.statistics.pairs,
            rounds=some.statistics.rounds,
            loss=some.loss - full.loss,
            gradient=float(difference / torch.linalg.vector_norm(full.gradients)),
            seconds=some.seconds / full.seconds,
        )


def calculate(
    loss: RerankerCachedGISTEmbedLoss, guide: Guide, columns: Sequence[Sequence[str]], embeddings: Sequence[Tensor]
) -> Calculation:
    """Calculate the loss and its gradients from embeddings.

    Args:
        loss: Loss that has ``guide`` as its client.
        guide: Scores the pairs; its scoring time is subtracted.
        columns: Anchors and positives.
        embeddings: Embeddings of each column, each of shape ``(batch, dim)``.
    """
    step = loss.begin(columns)
    step.settle(loss._settings())
    leaves = [column.clone().requires_grad_() for column in embeddings]
    scoring, began = guide.seconds, time.perf_counter()
    value = loss.calculate_loss([[leaf] for leaf in leaves], step, with_backward=True)
    seconds = time.perf_counter() - began - (guide.seconds - scoring)
    gradients = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
    return Calculation(float(value), gradients, seconds, step.statistics())


def candidates_figures(bench: Bench, plot: Path) -> list[Figure]:
    """Compare candidate selection with the full loss for each model, batch size and temperature.

    Args:
        bench: The run.
        plot: File for the plot, SVG.
    """
    quick = bench.scale < 1
    sizes, temperatures = (_QUICK_BATCHES, _QUICK_TEMPERATURES) if quick else (BATCHES, TEMPERATURES)
    columns = [list(column) for column in zip(*_pairs(max(sizes), _QUICK_PACKAGES if quick else PACKAGES), strict=True)]
    size = len(columns[0])
    bench.say(f"{size} pairs, no two with a text in common")
    student = load_student()
    embeddings = {name: _embed(model, columns) for name, model in (("minilm", load_minilm()), ("student", student))}
    guide = Guide(_guide_vectors(embeddings["minilm"], columns))
    found: dict[tuple[str, int, float], list[Comparison]] = {}
    for name, vectors in embeddings.items():
        for batch in (min(one, size) for one in sizes):
            for temperature in temperatures:
                losses = [_make(student, guide, temperature, candidates) for candidates in ("nearest", "all")]
                for begin in range(0, min(size // batch, bench.rounds) * batch, batch):
                    texts = [column[begin : begin + batch] for column in columns]
                    reps = [column[begin : begin + batch] for column in vectors]
                    some, full = (calculate(loss, guide, texts, reps) for loss in losses)
                    found.setdefault((name, batch, temperature), []).append(Comparison.of(some, full))
                last = found[name, batch, temperature][-1]
                bench.say(
                    f"{name}, batch {batch}, temperature {temperature}: {last.share:.2%} scored in {last.rounds} "
                    f"rounds, loss {last.loss:+.1e}, gradient {last.gradient:.1e}, time {last.seconds:.2f}x"
                )
    draw(plot, found)
    return list(figures(found))


def figures(found: dict[tuple[str, int, float], list[Comparison]]) -> Iterator[Figure]:
    """Yield the figures; ``found`` has the comparisons, one a batch, by (model, batch size, temperature)."""
    for key, comparisons in found.items():
        shares = Spread.of([one.share for one in comparisons])
        yield Figure(f"{_title(key)}: pairs scored", shares, "x", _SHARE_TARGET.get(key), False)
    for key, comparisons in found.items():
        yield Figure(f"{_title(key)}: rounds", _worst([one.rounds for one in comparisons]), "", None, False)
    for key, comparisons in found.items():
        # The target is a bound that must hold for every batch, so it is compared with the worst batch.
        worst = _worst([one.loss for one in comparisons])
        yield Figure(f"{_title(key)}: loss - full loss", worst, "", -math.log(TOP_P), False)
    for key, comparisons in found.items():
        apart = Spread.of([one.gradient for one in comparisons])
        yield Figure(f"{_title(key)}: gradient difference / gradient", apart, higher_is_better=False)
    for key, comparisons in found.items():
        times = Spread.of([one.seconds for one in comparisons])
        target = _TIME_TARGET if key[1] >= _TIME_TARGET_BATCH else None
        yield Figure(f"{_title(key)}: time / with all pairs", times, "x", target, False)


def _title(key: tuple[str, int, float]) -> str:
    name, batch, temperature = key
    return f"{name}, batch {batch}, T {temperature:g}"


def _worst(values: Sequence[float]) -> Spread:
    return Spread(max(values), min(values), max(values))


def _pairs(count: int, packages: Sequence[str]) -> list[tuple[str, str]]:
    """Read up to ``count`` docstring pairs, no two with a text in common."""
    seen: set[str] = set()

    def fresh() -> Iterator[tuple[str, str]]:
        # A quarter more than needed, because about a tenth of all pairs repeat a text of an earlier pair.
        for pair in collect(count + count // 4, packages):
            keys = {text_key(pair.summary), text_key(pair.body)}
            if not keys & seen:
                seen.update(keys)
                yield pair.summary, pair.body

    pairs = list(islice(fresh(), count))
    # Shuffled, so that a batch has pairs of all packages, as in training.
    random.Random(0).shuffle(pairs)
    return pairs


def _embed(model: SentenceTransformer, columns: Sequence[Sequence[str]]) -> list[Tensor]:
    return [model.encode(list(column), convert_to_tensor=True, show_progress_bar=False).cpu() for column in columns]


def _guide_vectors(embeddings: Sequence[Tensor], columns: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Make vectors whose cosine is the mean of two cosines: of the embeddings, and of the texts' TF-IDF vectors."""
    texts = [text for column in columns for text in column]
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)
    topics = TruncatedSVD(min(_TOPICS, words.shape[1] - 1), random_state=0).fit_transform(words)
    parts = [torch.cat(list(embeddings)), torch.from_numpy(topics.astype(np.float32))]
    joined = torch.cat([functional.normalize(part, dim=1) for part in parts], dim=1)
    return dict(zip(texts, functional.normalize(joined, dim=1), strict=True))


def _make(
    model: SentenceTransformer, guide: Guide, temperature: float, candidates: Candidates
) -> RerankerCachedGISTEmbedLoss:
    return RerankerCachedGISTEmbedLoss(
        model, guide, temperature, _MINI_BATCH, score_type="raw", candidates=candidates, top_p=TOP_P
    )


def draw(path: Path, found: dict[tuple[str, int, float], list[Comparison]]) -> None:
    """Plot the share of pairs scored over the batch size as SVG, with a line for each model and temperature."""
    canvas = Canvas(figsize=(7, 4), layout="constrained")
    axes = canvas.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    temperatures = sorted({temperature for _, _, temperature in found})
    for name, style in (("minilm", "-"), ("student", "--")):
        for number, temperature in enumerate(temperatures):
            batches = sorted(batch for one, batch, other in found if (one, other) == (name, temperature))
            spreads = [Spread.of([one.share for one in found[name, batch, temperature]]) for batch in batches]
            label = f"{name}, temperature {temperature:g}"
            axes.plot(
                batches, [spread.value for spread in spreads], style, marker="o", markersize=4, color=f"C{number}",
                label=label,
            )  # fmt: skip
    axes.set_xticks(sorted({batch for _, batch, _ in found}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size")
    axes.set_ylabel("pairs scored / all pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_svg(canvas, path)
