"""Report of a comparison: a table with intervals, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loss_client.compare.intervals import Interval, bootstrap
from loss_client.compare.methods import METHODS, WITHOUT_RERANKER, Method

_HEADS = ("method", "nDCG@10", "above no filter", "above hardness", "masked", "seconds")


@dataclass(frozen=True, slots=True)
class Result:
    """One trained model.

    Attributes:
        method: Its method.
        seed: Its seed.
        ndcg: nDCG@10 of each query.
        seconds: Time of its training.
        masked_fraction: Fraction of the negatives that the filter dropped; ``None`` without a filter.
    """

    method: Method
    seed: int
    ndcg: Sequence[float]
    seconds: float
    masked_fraction: float | None


def report(results: Sequence[Result], untrained: Sequence[float]) -> str:
    """Return the table and one sentence for each method with a reranker.

    Intervals are 95% bootstrap intervals over seeds and queries; with one seed, over queries alone.

    Args:
        results: Results of every method for the same seeds, in the same order.
        untrained: nDCG@10 of each query, of the model before training.
    """
    of: dict[Method, list[Result]] = {method: [one for one in results if one.method == method] for method in METHODS}
    ndcg = {method: np.array([one.ndcg for one in found]) for method, found in of.items()}  # (seeds, queries)
    rows: list[tuple[str, ...]] = [_HEADS, ("untrained", f"{np.mean(untrained):.3f}", "", "", "", "")]
    for method, found in of.items():
        masked = [one.masked_fraction for one in found if one.masked_fraction is not None]
        rows.append(
            (
                method,
                f"{ndcg[method].mean():.3f}",
                *("" if method == other else str(above(ndcg, method, other)) for other in WITHOUT_RERANKER),
                f"{np.mean(masked):.1%}" if masked else "",
                f"{np.mean([one.seconds for one in found]):,.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    seeds, queries = ndcg[METHODS[0]].shape
    over = f"{seeds} seeds and {queries:,} queries" if seeds > 1 else f"{queries:,} queries of 1 seed"
    best = max(WITHOUT_RERANKER, key=lambda method: float(ndcg[method].mean()))
    return "\n".join(
        [
            *lines,
            f"In brackets: 95% intervals over {over}. Seconds: of a training.",
            "",
            *(_sentence(ndcg, method, best) for method in METHODS if method not in WITHOUT_RERANKER),
        ]
    )


def above(ndcg: Mapping[Method, NDArray[np.float64]], method: Method, other: Method) -> Interval:
    """Return the difference in nDCG@10 between two methods, with its interval."""
    return bootstrap([ndcg[method] - ndcg[other]])


def _sentence(ndcg: Mapping[Method, NDArray[np.float64]], method: Method, other: Method) -> str:
    found = above(ndcg, method, other)
    if found.low > 0:
        return f"{method} is better than {other}, the best without a reranker: {found} nDCG@10."
    if found.high < 0:
        return f"{method} is worse than {other}, the best without a reranker: {found} nDCG@10."
    return (
        f"{method} cannot be told from {other}, the best without a reranker: {found} nDCG@10. More seeds, steps or "
        "queries may tell."
    )
