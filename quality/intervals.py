"""Intervals: bootstrap over seeds and queries of differences between two contenders, and per-query results as text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from examples.intervals import Interval


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


def pack(values: Sequence[float]) -> str:
    """Write numbers in [0, 1] as a short text; they are rounded to float16, that is, by 0.00025 at most."""
    return base64.b64encode(np.asarray(values, dtype="<f2").tobytes()).decode("ascii")


def unpack(text: str) -> NDArray[np.float64]:
    """Read the numbers that :func:`pack` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
