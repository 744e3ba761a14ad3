"""Report of the study: figures as JSON, tables in Markdown, and plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from benchmarks.report import Figure
from benchmarks.rounds import Spread
from loss_client.compare.intervals import Interval, bootstrap
from quality.intervals import unpack
from quality.ledger import Ledger, Record
from quality.plan import HARDNESS, LOCAL, NO_FILTER

#: Contenders that all others are compared with: heading of the difference, and name.
REFERENCES: dict[str, str] = {
    "above no filter": NO_FILTER.name,
    "above local guide": LOCAL.name,
    "above hardness": HARDNESS.name,
}


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one contender on one data set in one table.

    Attributes:
        ndcg: nDCG@10 by seed.
        by_query: nDCG@10 of each query by seed, each of shape ``(queries,)``.
        gain: nDCG@10 - nDCG@10 of the training without a filter, by seed.
        masked: Share of the negatives that the filter masked, over all seeds; ``None`` without a filter.
        scored: Share of the pairs of anchors and documents that were scored, over all seeds; ``None`` without a filter.
    """

    ndcg: dict[str, float]
    by_query: dict[str, NDArray[np.float64]]
    gain: dict[str, float]
    masked: float | None
    scored: float | None

    def differences(self, other: Row) -> NDArray[np.float64] | None:
        """Return nDCG@10 less that of another row, for the seeds of both; ``None`` without such a seed.

        The shape is ``(seeds, queries)``.
        """
        seeds = [seed for seed in self.by_query if seed in other.by_query]
        return np.stack([self.by_query[seed] - other.by_query[seed] for seed in seeds]) if seeds else None


def rows(ledger: Ledger) -> dict[tuple[str, str, str], Row]:
    """Return the results by (data set, table, contender), in the order of the trainings."""
    runs: dict[tuple[str, str, str], dict[str, Record]] = {}
    for (table, source, contender, seed), record in ledger.under("run").items():
        runs.setdefault((source, table, contender), {})[seed] = record
    made = {}
    for (source, table, contender), by_seed in runs.items():
        plain = runs.get((source, table, NO_FILTER.name), {})
        negatives = sum(one["negatives"] for one in by_seed.values())
        # One positive an anchor is scored besides the negatives.
        pairs = negatives + sum(one["anchors"] for one in by_seed.values())
        made[source, table, contender] = Row(
            ndcg={seed: one["ndcg"] for seed, one in by_seed.items()},
            by_query={seed: unpack(one["by_query"]) for seed, one in by_seed.items()},
            gain={seed: one["ndcg"] - plain[seed]["ndcg"] for seed, one in by_seed.items() if seed in plain},
            masked=sum(one["masked"] for one in by_seed.values()) / negatives if negatives else None,
            scored=sum(one["pairs_scored"] for one in by_seed.values()) / pairs if negatives else None,
        )
    return made


def compare(
    found: Mapping[tuple[str, str, str], Row], names: Sequence[str], table: str, contender: str, other: str
) -> Interval | None:
    """Return the mean over data sets of the difference between two contenders of a table, with its 95% interval."""
    if contender == other:
        return None
    differences = []
    for source in names:
        ours, theirs = found.get((source, table, contender)), found.get((source, table, other))
        one = None if ours is None or theirs is None else ours.differences(theirs)
        if one is None:
            return None
        differences.append(one)
    return bootstrap(differences)


def standard_error(values: Iterable[float]) -> float | None:
    """Return the standard error of the mean; ``None`` for fewer than two values."""
    listed = list(values)
    return statistics.stdev(listed) / math.sqrt(len(listed)) if len(listed) > 1 else None


def write_figures(path: Path, ledger: Ledger) -> None:
    """Write all results as a JSON list in the format of the benchmark's figures, with additional fields.

    ``value`` is the mean over the seeds; ``low`` and ``high`` are the least and the greatest value. In the records of
    differences with an ``interval``, they are the ends of the 95% interval instead.
    """
    records = []
    found = rows(ledger)
    for place, row in found.items():
        name = "; ".join(place)
        for what, values in (("nDCG@10", row.ndcg), ("nDCG@10 above no filter", row.gain)):
            if values:
                records.append(
                    {
                        **_figure(f"{name}: {what}", list(values.values()), "nDCG@10"),
                        "standard_error": standard_error(values.values()),
                        "by_seed": values,
                    }
                )
        for what, other in REFERENCES.items():
            interval = compare(found, place[:1], place[1], place[2], other)
            if interval is not None:
                spread = Spread(interval.mean, interval.low, interval.high)
                figure = Figure(f"{name}: nDCG@10 {what}, 95% interval", spread, "nDCG@10").record()
                records.append({**figure, "interval": 0.95, "seeds": len(row.ndcg)})
        for what, share in (("negatives masked", row.masked), ("pairs scored", row.scored)):
            if share is not None:
                records.append(_figure(f"{name}: {what}", [share], "share"))
    for kind, unit in (("reference", "nDCG@10"), ("guide", "nDCG@10"), ("filter", "negatives"), ("data", "pairs")):
        first = {"reference": "ndcg", "guide": "ndcg", "filter": "masked_unknown", "data": "pairs"}[kind]
        records += [
            {
                **_figure("; ".join([kind, *place]), [record[first]], unit),
                **{key: value for key, value in record.items() if key != "by_query"},
            }
            for place, record in ledger.under(kind).items()
        ]
    path.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def _figure(name: str, values: Sequence[float], unit: str) -> Record:
    return Figure(name, Spread(statistics.mean(values), min(values), max(values)), unit).record()


def tables(ledger: Ledger) -> str:
    """Return Markdown tables of the trainings, the guides and the margins."""
    found = rows(ledger)
    parts = []
    for table in dict.fromkeys(table for _, table, _ in found):
        names = list(dict.fromkeys(source for source, at, _ in found if at == table))
        for source in names:
            lines = [
                [contender, *_cells(row), *_differences(found, [source], table, contender), *_shares(row)]
                for (of, at, contender), row in found.items()
                if (of, at) == (source, table)
            ]
            heading = [f"{table}: {source}", "seeds", "nDCG@10", *REFERENCES, "masked", "scored"]
            parts.append(_markdown(heading, lines))
        if len(names) > 1:
            listed = dict.fromkeys(contender for _, at, contender in found if at == table)
            lines = [[contender, *_differences(found, names, table, contender)] for contender in listed]
            parts.append(_markdown([f"{table}: mean of the data sets", *REFERENCES], lines))
    names = list(dict.fromkeys(source for source, _ in ledger.under("reference")))
    parts.append(
        _markdown(
            ["nDCG@10 without training", *names],
            [
                [model, *(f"{ledger.under('reference', source)[(model,)]['ndcg']:.3f}" for source in names)]
                for model in dict.fromkeys(model for _, model in ledger.under("reference"))
            ],
        )
    )
    parts.append(
        _markdown(
            [
                "guide, on held-out neighbours",
                "nDCG@10",
                "to the bi-encoder",
                "accuracy@1",
                "known false negatives: AUC",
            ],
            [
                [
                    f"{source}, {guide}",
                    f"{record['ndcg']:.3f}",
                    f"{record['ndcg'] - ledger.under('guide', source, 'bi-encoder')[()]['ndcg']:+.3f}",
                    f"{record['first']:.3f}",
                    f"{record['known_auc']:.3f} (of {record['known']:,})",
                ]
                for (source, guide), record in ledger.under("guide").items()
            ],
        )
    )
    parts.append(
        _markdown(
            ["filter, on the training batches", "margin", "copies caught", "other known caught", "others masked"],
            [
                [
                    f"{source}, {regime}, {guide}",
                    margin,
                    _share(record, "known_copies"),
                    _share(record, "known_others"),
                    _share(record, "unknown", digits=2),
                ]
                for (source, regime, guide, margin), record in ledger.under("filter").items()
            ],
        )
    )
    return "\n".join(parts)


def _cells(row: Row) -> list[str]:
    return [str(len(row.ndcg)), f"{statistics.mean(row.ndcg.values()):.3f}"]


def _differences(
    found: Mapping[tuple[str, str, str], Row], names: Sequence[str], table: str, contender: str
) -> list[str]:
    intervals = [compare(found, names, table, contender, other) for other in REFERENCES.values()]
    return ["" if one is None else str(one) for one in intervals]


def _shares(row: Row) -> list[str]:
    return ["" if share is None else f"{share:.1%}" for share in (row.masked, row.scored)]


def _share(record: Record, kind: str, digits: int = 0) -> str:
    return f"{record[f'masked_{kind}'] / record[kind]:.{digits}%} of {record[kind]:,}" if record[kind] else "none"


def _markdown(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in heading[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, marks, *lines]) + "\n"


def draw_gains(path: Path, ledger: Ledger) -> None:
    """Plot the gain in nDCG@10 over no filter: a dot for every seed, and the mean with its 95% interval."""
    found = rows(ledger)
    names = list(dict.fromkeys(source for source, _, _ in found))
    # The screening last, because it chooses settings and its one seed decides nothing.
    regimes = sorted(dict.fromkeys(regime for _, regime, _ in found), key=lambda regime: regime == "screening")
    listed = {at: list(dict.fromkeys(one for _, regime, one in found if regime == at)) for at in regimes}
    canvas = Canvas(figsize=(5.5 * len(names) + 3, 0.32 * sum(map(len, listed.values())) + 2), layout="constrained")
    panels = canvas.subplots(
        len(regimes), len(names), squeeze=False, sharex=True, height_ratios=[len(one) for one in listed.values()]
    )
    for line, regime in zip(panels, regimes, strict=True):
        for axes, source in zip(line, names, strict=True):
            if not any((source, regime, contender) in found for contender in listed[regime]):
                axes.set_axis_off()
                continue
            for place, contender in enumerate(listed[regime]):
                row = found.get((source, regime, contender))
                if row is None or not row.gain:
                    continue
                gains = list(row.gain.values())
                color = "tab:blue" if " + kl" in contender else "tab:gray"
                axes.plot(gains, [place] * len(gains), ".", color=color, alpha=0.5)
                interval = compare(found, [source], regime, contender, NO_FILTER.name)
                if interval is not None:
                    error = [[interval.mean - interval.low], [interval.high - interval.mean]]
                    axes.errorbar(interval.mean, place, xerr=error, fmt="o", color=color, capsize=3)
            axes.axvline(0.0, color="black", linewidth=0.8)
            axes.set_yticks(range(len(listed[regime])), listed[regime] if source == names[0] else [])
            axes.set_ylim(len(listed[regime]) - 0.5, -0.5)
            axes.set_title(f"{source}: {regime}", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("nDCG@10 above no filter; right is better")
    canvas.savefig(path, dpi=110)


def draw_margins(path: Path, ledger: Ledger) -> None:
    """Plot the share of known false negatives that are masked over the share of other negatives, for each margin."""
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float, str]]]] = {}
    for (source, regime, guide, margin), record in ledger.under("filter").items():
        strategy, _, value = margin.partition(" ")
        if strategy == "absolute" and record["known_others"]:
            curves.setdefault((source, regime), {}).setdefault(guide, []).append((*_caught(record), value))
    canvas = Canvas(figsize=(4.2 * max(1, len(curves)), 4.2), layout="constrained")
    panels = canvas.subplots(1, max(1, len(curves)), squeeze=False)[0]
    for axes, ((source, regime), by_guide) in zip(panels, curves.items(), strict=False):
        for guide, points in by_guide.items():
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=guide)
            for x, y, value in points:
                axes.annotate(value, (x, y), xytext=(4, -10), textcoords="offset points", fontsize="small")
        axes.set_title(f"{source}: {regime}", fontsize="medium")
        axes.set_xlabel("others masked, share")
        axes.set_ylabel("known false negatives caught, share")
        axes.set_ylim(0, 1.03)
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=110)


def _caught(record: Mapping[str, float]) -> tuple[float, float]:
    return record["masked_unknown"] / max(record["unknown"], 1), record["masked_known_others"] / record["known_others"]
