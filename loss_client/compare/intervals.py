"""nDCG of single queries, and bootstrap intervals of differences between two trainings, over seeds and queries."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its interval, from ``low`` to ``high``; 95% unless its maker says otherwise."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def ndcg(ranked: Sequence[str], relevant: Collection[str], k: int = 10) -> float:
    """Return nDCG@k of one query, in [0, 1], where a document is either relevant or not.

    Args:
        ranked: Names of the documents, best first.
        relevant: Names of the relevant documents, at least one.
        k: Number of documents that count.
    """
    found = sum(1 / math.log2(rank + 2) for rank, document in enumerate(ranked[:k]) if document in relevant)
    return found / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(relevant))))


def bootstrap(
    differences: Sequence[NDArray[np.float64]], level: float = 0.95, resamples: int = 5_000, seed: int = 0
) -> Interval:
    """Compute the mean of paired differences and its percentile interval by bootstrap over seeds and queries.

    Each resample draws seeds and, independently, queries of a data set with replacement, and averages the differences
    of all drawn combinations: all trainings answer the same queries, so that both are sources of chance. The resample's
    value is the mean over the data sets. With a single seed, the interval is over queries alone.

    Args:
        differences: For each data set the differences by seed and query, shape ``(seeds, queries)``.
        level: Coverage of the interval, between 0 and 1.
        resamples: Number of resamples.
        seed: Seed of the resamples.
    """
    values = np.zeros(resamples)
    for place, one in enumerate(differences):
        of_seeds, of_queries = (_weights(size, resamples, (seed, place, axis)) for axis, size in enumerate(one.shape))
        values += np.einsum("rq,rq->r", of_seeds @ one, of_queries)
    low, high = np.quantile(values / len(differences), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([one.mean() for one in differences])), float(low), float(high))


# Kept, because all comparisons of a table have the same sizes.
@lru_cache(maxsize=8)
def _weights(size: int, resamples: int, seed: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the share of each of ``size`` items in each resample, shape ``(resamples, size)``."""
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=resamples)
    return counts / size
