"""nDCG of single queries, and the bootstrap interval of a paired difference between two models."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np


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


def paired_difference(values: Sequence[float], baseline: Sequence[float], samples: int = 10_000) -> Interval:
    """Return the mean of ``values - baseline`` with its percentile bootstrap interval.

    The queries are drawn, so that the interval says how far the difference depends on them. It does not say how far
    the difference depends on the seed of the training.

    Args:
        values: One number for each query.
        baseline: Numbers of another model for the same queries, in the same order.
        samples: Number of times that all queries are drawn, with replacement and with a fixed seed.
    """
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    generator = np.random.default_rng(0)
    # One draw at a time: all draws together would need samples x queries numbers.
    means = [differences[generator.integers(len(differences), size=len(differences))].mean() for _ in range(samples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))
