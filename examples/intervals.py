"""Bootstrap interval of a paired difference between two models, over the queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loss_client.compare.intervals import Interval


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
