"""Report of the study: figures as JSON, tables in Markdown, and plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from benchmarks.report import Figure
from benchmarks.rounds import Spread
from quality.contenders import NO_FILTER
from quality.ledger import Ledger, Record


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one contender on one data set in one regime.

    Attributes:
        ndcg: nDCG@10 by seed.
        gain: nDCG@10 - nDCG@10 of the training without a filter, by seed.
        masked: Share of the negatives that the filter masked, over all seeds; ``None`` without a filter.
        scored: Share of the pairs of anchors and documents that were scored, over all seeds; ``None`` without a filter.
    """

    ndcg: dict[str, float]
    gain: dict[str, float]
    masked: float | None
    scored: float | None


def rows(ledger: Ledger) -> dict[tuple[str, str, str], Row]:
    """Return the results by (data set, regime, contender), in the order of the trainings."""
    runs: dict[tuple[str, str, str], dict[str, Record]] = {}
    for (source, regime, contender, seed), record in ledger.under("run").items():
        runs.setdefault((source, regime, contender), {})[seed] = record
    made = {}
    for (source, regime, contender), by_seed in runs.items():
        plain = runs.get((source, regime, NO_FILTER), {})
        negatives = sum(one["negatives"] for one in by_seed.values())
        # One positive an anchor is scored besides the negatives.
        pairs = negatives + sum(one["anchors"] for one in by_seed.values())
        made[source, regime, contender] = Row(
            ndcg={seed: one["ndcg"] for seed, one in by_seed.items()},
            gain={seed: one["ndcg"] - plain[seed]["ndcg"] for seed, one in by_seed.items() if seed in plain},
            masked=sum(one["masked"] for one in by_seed.values()) / negatives if negatives else None,
            scored=sum(one["pairs_scored"] for one in by_seed.values()) / pairs if negatives else None,
        )
    return made


def standard_error(values: Iterable[float]) -> float | None:
    """Return the standard error of the mean; ``None`` for fewer than two values."""
    listed = list(values)
    return statistics.stdev(listed) / math.sqrt(len(listed)) if len(listed) > 1 else None


def write_figures(path: Path, ledger: Ledger) -> None:
    """Write all results as a JSON list in the format of the benchmark's figures, with additional fields.

    ``value`` is the mean over the seeds; ``low`` and ``high`` are the least and the greatest value.
    """
    records = []
    for place, row in rows(ledger).items():
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
        for what, share in (("negatives masked", row.masked), ("pairs scored", row.scored)):
            if share is not None:
                records.append(_figure(f"{name}: {what}", [share], "share"))
    for kind, unit in (("reference", "nDCG@10"), ("guide", "nDCG@10"), ("filter", "negatives"), ("data", "pairs")):
        first = {"reference": "ndcg", "guide": "ndcg", "filter": "masked_unknown", "data": "pairs"}[kind]
        records += [
            {**_figure("; ".join([kind, *place]), [record[first]], unit), **record}
            for place, record in ledger.under(kind).items()
        ]
    path.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def _figure(name: str, values: Sequence[float], unit: str) -> Record:
    return Figure(name, Spread(statistics.mean(values), min(values), max(values)), unit).record()


def tables(ledger: Ledger) -> str:
    """Return Markdown tables of the trainings, the guides and the margins."""
    found = rows(ledger)
    names = list(dict.fromkeys(source for source, _, _ in found))
    parts = []
    for regime in dict.fromkeys(regime for _, regime, _ in found):
        lines = [
            [
                contender,
                *(cell for source in names for cell in _cells(found.get((source, regime, contender)))),
            ]
            for contender in dict.fromkeys(contender for _, at, contender in found if at == regime)
        ]
        heading = [
            regime,
            *(f"{source}: {what}" for source in names for what in ("nDCG@10", "gain", "masked", "scored")),
        ]
        parts.append(_markdown(heading, lines))
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
            ["guide, on held-out neighbours", "nDCG@10", "accuracy@1", "known false negatives: AUC"],
            [
                [
                    f"{source}, {guide}",
                    f"{record['ndcg']:.3f}",
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


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", "", ""]
    shares = ["" if share is None else f"{share:.1%}" for share in (row.masked, row.scored)]
    return [_with_error(row.ndcg.values(), ".3f"), _with_error(row.gain.values(), "+.3f"), *shares]


def _with_error(values: Iterable[float], form: str) -> str:
    listed = list(values)
    if not listed:
        return ""
    error = standard_error(listed)
    return f"{statistics.mean(listed):{form}}" + ("" if error is None else f" ± {error:.3f}")


def _share(record: Record, kind: str, digits: int = 0) -> str:
    return f"{record[f'masked_{kind}'] / record[kind]:.{digits}%} of {record[kind]:,}" if record[kind] else "none"


def _markdown(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in heading[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, marks, *lines]) + "\n"


def draw_gains(path: Path, ledger: Ledger) -> None:
    """Plot the gain in nDCG@10 over no filter: a dot for every seed, and the mean with its standard error."""
    found = rows(ledger)
    names = list(dict.fromkeys(source for source, _, _ in found))
    regimes = list(dict.fromkeys(regime for _, regime, _ in found))
    listed = {at: list(dict.fromkeys(one for _, regime, one in found if regime == at)) for at in regimes}
    canvas = Canvas(figsize=(5.5 * len(names) + 3, 0.32 * sum(map(len, listed.values())) + 2), layout="constrained")
    panels = canvas.subplots(
        len(regimes), len(names), squeeze=False, sharex=True, height_ratios=[len(one) for one in listed.values()]
    )
    for line, regime in zip(panels, regimes, strict=True):
        for axes, source in zip(line, names, strict=True):
            for place, contender in enumerate(listed[regime]):
                row = found.get((source, regime, contender))
                if row is None or not row.gain:
                    continue
                gains = list(row.gain.values())
                color = "tab:blue" if contender.startswith("cross-encoder") else "tab:gray"
                axes.plot(gains, [place] * len(gains), ".", color=color, alpha=0.5)
                axes.errorbar(
                    statistics.mean(gains), place, xerr=standard_error(gains) or 0.0, fmt="o", color=color, capsize=3
                )
            axes.axvline(0.0, color="black", linewidth=0.8)
            axes.set_yticks(range(len(listed[regime])), listed[regime] if source == names[0] else [])
            axes.invert_yaxis()
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
