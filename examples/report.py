"""Report of the demo: results as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from examples.contenders import FilterCounts


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one model: a row of the table.

    Attributes:
        name: Name of the filter, or of a model that was not trained here.
        loss: Name of the loss's class; empty for a model that was not trained here.
        ndcg: nDCG@10 on the held-out queries, in [0, 1].
        mrr: MRR@10 on the held-out queries, in [0, 1].
        step_seconds: Median seconds of one training step; ``None`` for a model that was not trained here.
        counts: Counts of the filter.
        losses: (step, logged training loss); losses with different filters are not comparable.
    """

    name: str
    loss: str
    ndcg: float
    mrr: float
    step_seconds: float | None = None
    counts: FilterCounts = FilterCounts()  # noqa: RUF009 (frozen)
    losses: tuple[tuple[int, float], ...] = ()


def table(results: Sequence[Result], queries: int) -> Table:
    """Make a table of the results; ``queries`` is the number of held-out queries."""
    losses = "; ".join(f"{result.name}: {result.loss}" for result in results if result.loss)
    made = Table(title=f"Held-out modules, {queries:,} queries", caption=losses, box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("filter")
    for heading in ("nDCG@10", "MRR@10", "s a step", "pairs scored", "negatives masked"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        counts = result.counts
        share = f"{counts.masked:,} ({counts.masked / counts.negatives:.1%})" if counts.negatives else "-"
        made.add_row(
            result.name,
            f"{result.ndcg:.3f}",
            f"{result.mrr:.3f}",
            "-" if result.step_seconds is None else f"{result.step_seconds:.2f}",
            f"{counts.pairs_scored:,}" if counts.pairs_scored else "-",
            share,
        )
    return made


def verdict(results: Sequence[Result], queries: int) -> str:
    """Say which trained model has the highest nDCG@10, by how much, and with what standard error.

    The mean of ``queries`` numbers in [0, 1] whose mean is m has a standard error of at most
    ``sqrt(m (1 - m) / queries)`` (Bhatia and Davis: a variance is at most (1 - m) m).
    """
    best, *others = sorted((one for one in results if one.loss), key=lambda one: one.ndcg, reverse=True)
    error = math.sqrt(best.ndcg * (1 - best.ndcg) / queries)
    leads = ", ".join(f"{best.ndcg - other.ndcg:.3f} above {other.loss}" for other in others)
    return (
        f"Highest nDCG@10: {best.loss}, {leads}. One seed; the standard error of each value over the queries is at "
        f"most {error:.3f}."
    )


def write_results(path: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Write a JSON object with the fields of ``about``, which describe the run, and all results under ``"results"``."""
    content = {**about, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(path: Path, results: Sequence[Result], queries: int) -> None:
    """Plot retrieval quality and step times side by side, as PNG."""
    figure = Figure(figsize=(12, 0.75 * len(results) + 1.6), layout="constrained")
    quality, times = figure.subplots(ncols=2, width_ratios=(3, 2), sharey=True)
    places = list(range(len(results)))
    for offset, color, label, values in (
        (-0.2, "tab:blue", "nDCG@10", [result.ndcg for result in results]),
        (0.2, "tab:cyan", "MRR@10", [result.mrr for result in results]),
    ):
        bars = quality.barh([place + offset for place in places], values, height=0.38, color=color, label=label)
        quality.bar_label(bars, fmt="%.3f", padding=3)
    quality.set_yticks(places, [f"{one.name}\n{one.loss}" if one.loss else one.name for one in results])
    quality.invert_yaxis()
    quality.margins(x=0.12)
    quality.set_xlabel(f"{queries:,} held-out queries; higher is better")
    quality.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    trained = [(place, result.step_seconds) for place, result in enumerate(results) if result.step_seconds is not None]
    bars = times.barh(
        [place for place, _ in trained], [seconds for _, seconds in trained], height=0.5, color="tab:gray"
    )
    times.bar_label(bars, fmt="%.2f s", padding=3)
    times.margins(x=0.18)
    times.set_xlabel("seconds a training step (median)")
    for axes in (quality, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
