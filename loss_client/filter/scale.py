"""Scale: raw scores of a reranker as probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loss_client.client.scores import RawScale


def probabilities(raw: NDArray[np.float32], scale: RawScale) -> NDArray[np.float32]:
    """Return raw scores as probabilities in [0, 1], in the shape of ``raw``.

    The reranker service computes its probabilities in the same float32 operations, so that a filter makes the same
    decisions from either. From a logit of 17 on, a probability is 1: raw scores cannot be computed back.

    Args:
        raw: Raw scores.
        scale: ``"logit"``: the logistic function is applied. ``"cosine"``: [-1, 1] is mapped to [0, 1].
    """
    if scale == "cosine":
        return (1 + raw) * np.float32(0.5)
    small = np.exp(-np.abs(raw))  # no exponential overflows
    probability: NDArray[np.float32] = np.where(raw >= 0, 1 / (1 + small), small / (1 + small))
    return probability
