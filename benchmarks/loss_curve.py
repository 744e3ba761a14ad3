"""Benchmark of the choice of pairs: the share of the masks that each mode finds, over the share of pairs it scores.

A mask is a negative that the filter drops if every pair is scored. Texts and guide are those of ``loss_candidates``:
the guide's score is the mean of two cosines, of all-MiniLM's embeddings and of TF-IDF vectors. The preselectors are
all-MiniLM, a part of the guide, and the demo's student, its first three layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.loss_candidates import Guide, _embed, _guide_vectors, _pairs
from benchmarks.report import Figure, save_svg
from benchmarks.rounds import Spread
from examples.docstrings import PACKAGES
from examples.student import load_minilm, load_student
from loss_client import RerankerCachedGISTEmbedLoss

BATCH = 1024
MARGINS = (0.0, 0.05, 0.2)
PER_ANCHOR = (1, 2, 4, 8, 16, 32)
TOP_PS = (0.7, 0.9, 0.99, 0.999)
PRESELECTORS = ("minilm", "student")
TEMPERATURE = 0.02
#: Least share of the masks that ``nearest`` shall find with twice as many pairs as there are masks.
TARGET = 0.95
_QUICK_BATCH = 64
_QUICK_PACKAGES = ("numpy",)
_MINI_BATCH = 256


@dataclass(frozen=True, slots=True)
class Point:
    """Pairs and masks of one mode on one batch.

    Attributes:
        scored: Pairs with a score / all pairs; each anchor's own documents are among them.
        found: Masked negatives / masked negatives if all pairs are scored.
        pairs: Pairs with a score beside own documents / masked negatives if all pairs are scored.
    """

    scored: float
    found: float
    pairs: float


Curves = dict[tuple[str, float], dict[str, list[Point]]]
"""Points of each series, such as ``"nearest, minilm"`` and ``"top_p"``, by batching and margin."""


@dataclass(slots=True)
class _Batch:
    """One batch of texts with what the modes need of it."""

    columns: list[list[str]]
    vectors: dict[str, list[Tensor]]  # by model: embeddings of unit length of each column
    guide: Guide

    def run(self, model: Any, margin: float, **options: Any) -> tuple[int, int]:
        """Return (pairs with a score, masked negatives) of a mode."""
        loss = RerankerCachedGISTEmbedLoss(
            model, self.guide, TEMPERATURE, _MINI_BATCH, score_type="raw", margin=margin, **options
        )
        step = loss.begin(self.columns)
        step.settle(loss._settings())
        anchors, *documents = self.vectors["student"]
        logits = anchors @ torch.cat(documents).T / TEMPERATURE
        step.select(_MINI_BATCH, lambda begin, end: logits[begin:end])
        masked = sum(
            int(step.mask(begin, min(begin + _MINI_BATCH, len(anchors))).sum())
            for begin in range(0, len(anchors), _MINI_BATCH)
        )
        return step.statistics().pairs, masked

    def preselector(self, name: str) -> Any:
        """Return a function that embeds the batch's texts with a model, from embeddings made before."""
        known = {
            text: vector.numpy()
            for texts, vectors in zip(self.columns, self.vectors[name], strict=True)
            for text, vector in zip(texts, vectors, strict=True)
        }

        def embed(texts: list[str]) -> NDArray[np.float32]:
            return np.stack([known[text] for text in texts])

        return embed

    def curves(self, model: Any, margin: float) -> dict[str, list[Point]]:
        """Return the points of each series at one margin; empty without masks."""
        every, masks = self.run(model, margin)
        own = len(self.columns[0]) * (len(self.columns) - 1)
        if not masks:
            return {}

        def point(**options: Any) -> Point:
            pairs, found = self.run(model, margin, **options)
            return Point(pairs / every, found / masks, (pairs - own) / masks)

        found: dict[str, list[Point]] = {}
        for name in PRESELECTORS:
            embed = self.preselector(name)
            ks = [*PER_ANCHOR, 2 * masks / len(self.columns[0])]
            *points, twice = [point(candidates="nearest", preselector=embed, per_anchor=k) for k in ks]
            found[f"nearest, {name}"], found[f"twice, {name}"] = points, [twice]
        found["top_p"] = [point(candidates="nearest", top_p=top_p) for top_p in TOP_PS]
        return found


def curve_figures(bench: Bench, plot: Path) -> list[Figure]:
    """Compare the modes on one batch of random pairs and one with mined negatives.

    Args:
        bench: The run.
        plot: File for the plot, SVG.
    """
    quick = bench.scale < 1
    curves = measure(_QUICK_BATCH if quick else BATCH, _QUICK_PACKAGES if quick else PACKAGES, bench.say)
    draw(plot, curves)
    return figures(curves)


def measure(size: int, packages: Sequence[str], say: Any) -> Curves:
    """Measure all modes.

    Args:
        size: Rows of a batch.
        packages: Packages whose docstrings are the texts.
        say: Prints one line of progress.
    """
    pairs = _pairs(2 * size, packages)
    size = min(size, len(pairs) // 2)
    anchors, bodies = [anchor for anchor, _ in pairs[:size]], [body for _, body in pairs]
    models = {"minilm": load_minilm(), "student": load_student()}
    embedded = {name: _embed(model, [anchors, bodies]) for name, model in models.items()}
    # The mined negative is the nearest document, except the anchor's positive; many are false.
    similar = embedded["minilm"][0] @ embedded["minilm"][1].T
    mined = similar.fill_diagonal_(-torch.inf).argmax(1)
    curves: Curves = {}
    for batching in ("random", "mined"):
        negatives = [mined] if batching == "mined" else []
        columns = [anchors, bodies[:size], *([bodies[place] for place in places] for places in negatives)]
        vectors = {
            name: [first, second[:size], *(second[places] for places in negatives)]
            for name, (first, second) in embedded.items()
        }
        batch = _Batch(columns, vectors, Guide(_distinct(columns, vectors["minilm"])))
        for margin in MARGINS:
            curves[batching, margin] = batch.curves(models["student"], margin)
            for name, points in curves[batching, margin].items():
                shares = ", ".join(f"{point.scored:.2%} {point.found:.1%}" for point in points)
                say(f"{batching}, margin {margin:g}, {name}: {shares}")
    return curves


def _distinct(columns: Sequence[Sequence[str]], embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the guide's vectors of the distinct texts of columns."""
    places: dict[str, Tensor] = {}
    for texts, vectors in zip(columns, embeddings, strict=True):
        places.update(zip(texts, vectors, strict=True))
    return _guide_vectors([torch.stack(list(places.values()))], [list(places)])


def figures(curves: Curves) -> list[Figure]:
    """Return the figures: the share of the masks that each mode finds, and the aim."""
    found = []
    for (batching, margin), series in curves.items():
        title = f"{batching}, margin {margin:g}"
        for name in PRESELECTORS:
            for point in series.get(f"twice, {name}", []):
                spread = Spread(point.found, point.found, point.found)
                found.append(
                    Figure(f"{title}, nearest by {name}: masks found with 2 pairs a mask", spread, "x", TARGET)
                )
        for name, points in series.items():
            labels = TOP_PS if name == "top_p" else PER_ANCHOR
            for label, point in zip(labels, points, strict=False):
                if name.startswith("twice"):
                    continue
                spread = Spread(point.found, point.found, point.found)
                setting = f"{label:g}" if name == "top_p" else f"{label:g} an anchor"
                found.append(Figure(f"{title}, {name}, {setting} ({point.scored:.2%} scored): masks found", spread))
    return found


def draw(path: Path, curves: Curves) -> None:
    """Plot the share of masks found over the share of pairs scored as SVG, with a panel for each batching."""
    batchings = list(dict.fromkeys(batching for batching, _ in curves))
    canvas = Canvas(figsize=(4.5 * len(batchings), 4), layout="constrained")
    panels = canvas.subplots(1, len(batchings), sharey=True, squeeze=False)[0]
    styles = {"nearest, minilm": "-", "nearest, student": "--", "top_p": ":"}
    for axes, batching in zip(panels, batchings, strict=True):
        for number, margin in enumerate(MARGINS):
            for name, style in styles.items():
                points = curves[batching, margin].get(name, [])
                axes.plot(
                    [point.scored for point in points], [point.found for point in points], style, marker="o",
                    markersize=3, color=f"C{number}", label=f"{name}, margin {margin:g}",
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(f"{batching} batch")
        axes.set_xlabel("pairs scored / all pairs")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("masks found / all masks")
    panels[-1].legend(frameon=False, fontsize="x-small")
    save_svg(canvas, path)
