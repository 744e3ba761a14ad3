"""Scale: kind of a reranker's raw scores, and raw scores as probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loss_client.client.scores import RawScale
from loss_client.filter.jobs import ScoringClient


class ModelScale:
    """Scale of a client's raw scores, asked for once for each model that the client has.

    Args:
        client: The client. Its ``fingerprint``, if it has one, tells the model.
    """

    def __init__(self, client: ScoringClient) -> None:
        self._client = client
        self._scale: RawScale | None = None  # unknown before it is first needed
        self._model: str | None = None  # fingerprint of the model that has this scale

    def read(self, timeout: float | None) -> RawScale:
        """Return the scale; asks the server, at most ``timeout`` seconds, unless the model's scale is known."""
        model = getattr(self._client, "fingerprint", None)
        if self._scale is None or self._model != model:
            self._scale = self._client.raw_scale(timeout)
            self._model = model
        return self._scale


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
