"""Report of a comparison: a table with intervals, and sentences about the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loss_client.compare.intervals import Interval, bootstrap
from loss_client.compare.methods import WITH_ALL_PAIRS, WITHOUT_RERANKER, Method

_HEADS = ("method", "nDCG@10", "above no filter", "above hardness", "scored", "masked", "seconds")


@dataclass(frozen=True, slots=True)
class Result:
    """One trained model.

    Attributes:
        method: Its method.
        seed: Its seed.
        ndcg: nDCG@10 of each query.
        seconds: Time of its training.
        masked_fraction: Fraction of the negatives that the filter dropped; ``None`` without a filter.
        scored_fraction: Fraction of the pairs of a batch that were scored; ``None`` without a filter.
    """

    method: Method
    seed: int
    ndcg: Sequence[float]
    seconds: float
    masked_fraction: float | None
    scored_fraction: float | None = None


def report(results: Sequence[Result], untrained: Sequence[float]) -> str:
    """Return the table, and sentences that compare each method with a reranker with those without.

    A method that scores the nearest pairs only is compared with the same method that scores all, too, if there are
    results of it. The table has the fraction of scored pairs if there is such a method. Intervals are 95% bootstrap
    intervals over seeds and queries; with one seed, over queries alone.

    Args:
        results: Results of every method for the same seeds, in the same order.
        untrained: nDCG@10 of each query, of the model before training.
    """
    methods = list(dict.fromkeys(one.method for one in results))
    of: dict[Method, list[Result]] = {method: [one for one in results if one.method == method] for method in methods}
    ndcg = {method: np.array([one.ndcg for one in found]) for method, found in of.items()}  # (seeds, queries)
    rows: list[tuple[str, ...]] = [_HEADS, ("untrained", f"{np.mean(untrained):.3f}", "", "", "", "", "")]
    for method, found in of.items():
        rows.append(
            (
                method,
                f"{ndcg[method].mean():.3f}",
                *("" if method == other else str(above(ndcg, method, other)) for other in WITHOUT_RERANKER),
                _mean([one.scored_fraction for one in found]),
                _mean([one.masked_fraction for one in found]),
                f"{np.mean([one.seconds for one in found]):,.1f}",
            )
        )
    if not any(method in WITH_ALL_PAIRS for method in methods):
        rows = [tuple(cell for head, cell in zip(_HEADS, row, strict=True) if head != "scored") for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    seeds, queries = ndcg[methods[0]].shape
    over = f"{seeds} seeds and {queries:,} queries" if seeds > 1 else f"{queries:,} queries of 1 seed"
    best = max(WITHOUT_RERANKER, key=lambda method: float(ndcg[method].mean()))
    return "\n".join(
        [
            *lines,
            f"In brackets: 95% intervals over {over}. Seconds: of a training.",
            "",
            *(
                _sentence(ndcg, method, best, "the best without a reranker")
                for method in methods
                if method not in WITHOUT_RERANKER
            ),
            *(
                _sentence(ndcg, method, WITH_ALL_PAIRS[method], "which scores all pairs")
                for method in methods
                if WITH_ALL_PAIRS.get(method) in methods
            ),
        ]
    )


def above(ndcg: Mapping[Method, NDArray[np.float64]], method: Method, other: Method) -> Interval:
    """Return the difference in nDCG@10 between two methods, with its interval."""
    return bootstrap([ndcg[method] - ndcg[other]])


def _mean(fractions: Sequence[float | None]) -> str:
    known = [one for one in fractions if one is not None]
    return f"{np.mean(known):.1%}" if known else ""


def _sentence(ndcg: Mapping[Method, NDArray[np.float64]], method: Method, other: Method, which: str) -> str:
    found = above(ndcg, method, other)
    if found.low > 0:
        return f"{method} is better than {other}, {which}: {found} nDCG@10."
    if found.high < 0:
        return f"{method} is worse than {other}, {which}: {found} nDCG@10."
    return f"{method} cannot be told from {other}, {which}: {found} nDCG@10. More seeds, steps or queries may tell."
