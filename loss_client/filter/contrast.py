"""Contrastive term: pure functions from logits and masks to the loss of some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
"""Negatives whose logits get a penalty; see ``RerankerCachedGISTEmbedLoss``."""


@dataclass(frozen=True, slots=True)
class Hardness:
    """Penalties on the logits of negatives, as in sentence-transformers' ``CachedMultipleNegativesRankingLoss``.

    Attributes:
        mode: The negatives that get a penalty.
        strength: Factor of the cosine.
    """

    mode: HardnessMode
    strength: float

    @classmethod
    def of(cls, mode: HardnessMode | None, strength: float) -> Hardness | None:
        """Return the penalties of a mode and a strength; ``None`` if they change nothing."""
        return None if mode is None or not strength else cls(mode, strength)

    def penalties(self, cosines: Tensor, own: Tensor, starts: Sequence[int], rows: int) -> Tensor:
        """Return the summands of the logits, in the shape of ``cosines``.

        Args:
            cosines: Shape ``(anchors, candidates)``.
            own: The anchors' numbers among all rows, shape ``(anchors,)``.
            starts: Position of the first candidate of each column of documents, positives first.
            rows: Number of all rows, which is the number of documents of a column.
        """
        lines = torch.arange(len(own), device=own.device)
        chosen = torch.zeros_like(cosines, dtype=torch.bool)
        for number, start in enumerate(starts):
            chosen[:, start : start + rows] = self.mode != "hard_negatives"
            chosen[lines, start + own] = number > 0 and self.mode != "in_batch_negatives"
        return torch.where(chosen, self.strength * cosines.detach(), 0)


def contrastive_loss(logits: Tensor, own: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the rows' contrastive losses, a scalar.

    A row's loss is the log-sum-exp of its logits that are not masked, less the logit of its own positive.

    Args:
        logits: Shape ``(rows, candidates)``.
        own: Position of each row's own positive, shape ``(rows,)``.
        mask: True for candidates that are dropped, same shape as ``logits``.
    """
    return functional.cross_entropy(logits.masked_fill(mask, -torch.inf), own, reduction="sum")
