"""Report of the demo: results as a table, as a sentence, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from examples.contenders import FilterCounts
from loss_client.compare.intervals import Interval


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one model: a row of the table.

    Attributes:
        name: Name of the contender, or of a model that was not trained here.
        loss: Name of the loss's class; empty for a model that was not trained here.
        ndcg: nDCG@10 on the held-out queries, in [0, 1].
        mrr: MRR@10 on the held-out queries, in [0, 1].
        step_seconds: Median seconds of one training step; ``None`` for a model that was not trained here.
        counts: Counts of the filter.
        losses: (step, logged training loss); losses with different filters are not comparable.
        gain: Paired difference of nDCG@10 against the training without a filter; ``None`` for that training itself and
            for models that were not trained here.
    """

    name: str
    loss: str
    ndcg: float
    mrr: float
    step_seconds: float | None = None
    counts: FilterCounts = FilterCounts()  # noqa: RUF009 (frozen)
    losses: tuple[tuple[int, float], ...] = ()
    gain: Interval | None = None


def table(results: Sequence[Result], baseline: str, queries: int) -> Table:
    """Make a table of the results.

    Args:
        results: The rows.
        baseline: Name of the result that the gains are measured against.
        queries: Number of held-out queries.
    """
    made = Table(title=f"Held-out modules, {queries:,} queries", box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("training")
    for heading in ("nDCG@10", f"above {baseline} (95%)", "s a step", "masked"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        counts = result.counts
        made.add_row(
            result.name,
            f"{result.ndcg:.3f}",
            "-" if result.gain is None else str(result.gain),
            "-" if result.step_seconds is None else f"{result.step_seconds:.2f}",
            f"{counts.masked / counts.negatives:.1%}" if counts.negatives else "-",
        )
    return made


def verdict(results: Sequence[Result], baseline: str, queries: int) -> str:
    """Say in one sentence, from the intervals of the gains, which trainings are better or worse than the baseline."""
    found = [
        f"{one.name} is {_compared(one.gain)} {baseline}: {one.gain.mean:+.3f} nDCG@10, 95% interval "
        f"{one.gain.low:+.3f} to {one.gain.high:+.3f}"
        for one in results
        if one.gain is not None
    ]
    return f"What came out, with one seed and {queries:,} queries: {'; '.join(found)}."


def _compared(gain: Interval) -> str:
    if gain.low > 0:
        return "better than"
    if gain.high < 0:
        return "worse than"
    return "not distinguishable from"


def write_results(path: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Write a JSON object with the fields of ``about``, which describe the run, and all results under ``"results"``."""
    content = {**about, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def draw(path: Path, results: Sequence[Result], baseline: str, queries: int) -> None:
    """Plot retrieval quality and the gains with their intervals side by side, as PNG; for the arguments see `table`."""
    figure = Figure(figsize=(12, 0.75 * len(results) + 1.6), layout="constrained")
    quality, gains = figure.subplots(ncols=2, width_ratios=(3, 2), sharey=True)
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

    gains.axvline(0, color="tab:gray", linewidth=1)
    for place, result in enumerate(results):
        if (gain := result.gain) is not None:
            error = [[gain.mean - gain.low], [gain.high - gain.mean]]
            gains.errorbar(gain.mean, place, xerr=error, fmt="o", color="tab:blue", capsize=4)
    gains.set_xlabel(f"nDCG@10 above {baseline}, 95% interval")
    for axes in (quality, gains):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
