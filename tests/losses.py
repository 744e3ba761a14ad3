"""Losses of the tests, and their variants."""

from __future__ import annotations

import itertools
from typing import Any

from loss_client.loss import RerankerCachedGISTEmbedLoss

CONTRAST: list[dict[str, Any]] = [
    {"contrast_anchors": anchors, "contrast_positives": positives, "contrast_filter": by}
    for anchors, positives in itertools.product([False, True], repeat=2)
    for by in ["known", "scores"]
]
"""Every combination of the loss's contrast options."""


def make(model: Any, scorer: Any, **options: Any) -> RerankerCachedGISTEmbedLoss:
    """Return a loss for the scores of ``training.MemoryScorer``, which are in no unit."""
    return RerankerCachedGISTEmbedLoss(model, scorer, **{"temperature": 0.05, "score_type": "raw", **options})
