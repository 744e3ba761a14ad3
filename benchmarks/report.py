"""Report of a benchmark: figures, written as JSON, as a table and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullLocator
from rich import box
from rich.table import Table

from benchmarks.rounds import Spread

_WIDEST = 8.0  # largest multiple of a target that the plot shows


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity: a row of the table.

    Attributes:
        name: Name of the quantity, with the model.
        spread: Median, least and greatest value over the rounds.
        unit: Unit of value and target; "x" for a ratio of speeds or times.
        target: Value to reach; ``None`` for a figure without a target.
        higher_is_better: Whether a higher value is better.
    """

    name: str
    spread: Spread
    unit: str = "x"
    target: float | None = None
    higher_is_better: bool = True

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the target; ``None`` without a target."""
        if self.target is None:
            return None
        return self.spread.value >= self.target if self.higher_is_better else self.spread.value <= self.target

    def record(self) -> dict[str, Any]:
        """Return the figure as a JSON object of the result files."""
        return {
            "figure": self.name,
            "value": self.spread.value,
            "low": self.spread.low,
            "high": self.spread.high,
            "target": self.target,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
        }


def write(path: Path, figures: Sequence[Figure]) -> None:
    """Write all figures as a JSON list."""
    path.write_text(json.dumps([figure.record() for figure in figures], indent=2) + "\n", encoding="utf-8")


def table(figures: Sequence[Figure]) -> Table:
    """Make a table of the figures and their targets."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("figure")
    for heading in ("value", "low", "high", "target", ""):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("unit")
    for figure in figures:
        spread = figure.spread
        target = "" if figure.target is None else f"{'≥' if figure.higher_is_better else '≤'} {_short(figure.target)}"
        mark = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[figure.reached]
        values = (_short(value) for value in (spread.value, spread.low, spread.high))
        made.add_row(figure.name, *values, target, mark, figure.unit)
    return made


def draw(path: Path, figures: Sequence[Figure]) -> None:
    """Plot every figure that has a target as a multiple of the target, as PNG; bars to the right reach the target."""
    aimed = [figure for figure in figures if figure.target]
    canvas = Canvas(figsize=(11, 0.42 * len(aimed) + 1.4), layout="constrained")
    axes = canvas.subplots()
    axes.set_xscale("log")
    for place, figure in enumerate(aimed):
        spread = figure.spread
        low, value, high = (_of_target(figure, one) for one in (spread.low, spread.value, spread.high))
        # Bars start at 1, so that their direction shows whether the target is reached.
        axes.barh(place, value - 1, left=1, height=0.6, color="tab:green" if figure.reached else "tab:red", alpha=0.75)
        axes.plot([low, high], [place, place], color="black", linewidth=1.2)
        label = f"{_short(spread.value)} (target {_short(figure.target or 0)} {figure.unit})"
        axes.annotate(
            label, (max(1.0, value, low, high), place), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(aimed)), [figure.name for figure in aimed])
    axes.invert_yaxis()
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.5), max(2.0, right) * 2.5)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("multiple of the target (right is better); lines show the range over the rounds")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=120)


def save_svg(canvas: Canvas, path: Path) -> None:
    """Save a plot as SVG; equal plots give equal files."""
    with rc_context({"svg.hashsalt": path.stem}):
        canvas.savefig(path, format="svg", metadata={"Date": None})


def _of_target(figure: Figure, value: float) -> float:
    """Value as a multiple of the target, above 1 where it is better, clipped to the range of the plot."""
    assert figure.target
    share = max(value / figure.target, 1 / _WIDEST)
    return min(share, _WIDEST) if figure.higher_is_better else 1 / share


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
