"""Logits of a step: cosine / temperature of a rank's anchors with their candidates, and the penalties of hardness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from loss_client.filter.contrast import Hardness
from loss_client.filter.gather import Rows, gather_embeddings


def gathered_units(columns: Sequence[Sequence[Tensor]], rows: Rows, contrast_anchors: bool) -> list[Tensor]:
    """Return unit embeddings, in float32 or wider, each of shape ``(rows, dim)``.

    Args:
        columns: This rank's embeddings by column and mini-batch, anchors first, each ``(mini_batch_size, dim)``.
        rows: Position of this rank's rows.
        contrast_anchors: Whether the anchors are candidates too.

    Returns:
        This rank's anchors, then positives, negatives by column and, with ``contrast_anchors``, anchors, each of all
        ranks.
    """
    units = [_units(column) for column in columns]
    gathered = [gather_embeddings(column, rows) for column in units[1:]]
    if contrast_anchors:
        gathered.append(gather_embeddings(units[0], rows))
    return [units[0], *gathered]


def _units(mini_batches: Sequence[Tensor]) -> Tensor:
    """Scale one column's embeddings to unit length, shape ``(batch, dim)``."""
    embeddings = torch.cat(list(mini_batches))
    return functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


@dataclass(frozen=True, slots=True)
class CandidateLogits:
    """Logits of this rank's anchors with their candidates, computed some rows at a time.

    Candidates are all positives, all anchors (with ``contrast_anchors``), all positives again as negatives of the
    anchor's positive (with ``contrast_positives``), then each column of negatives.

    Attributes:
        embeddings: As :func:`gathered_units` returns them.
        rows: Position of this rank's rows.
        temperature: Divisor of the cosines.
        contrast_anchors: Whether the anchors are candidates.
        contrast_positives: Whether the positives are negatives of the anchor's positive.
        hardness: Penalties on the logits of negatives; ``None`` for none.
    """

    embeddings: Sequence[Tensor]
    rows: Rows
    temperature: float
    contrast_anchors: bool
    contrast_positives: bool
    hardness: Hardness | None

    def plain(self, begin: int, end: int) -> Tensor:
        """Compute cosine / temperature of the local rows from begin to end, shape ``(end - begin, candidates)``."""
        anchors, positives, *others = self.embeddings
        rows = anchors[begin:end]  # (mini_batch_size, dim)
        blocks = [rows @ positives.T]
        if self.contrast_anchors:
            blocks.append(rows @ others.pop().T)
        if self.contrast_positives:
            offset = self.rows.offset
            blocks.append(positives[begin + offset : end + offset] @ positives.T)
        blocks.extend(rows @ negatives.T for negatives in others)
        return torch.cat(blocks, dim=1) / self.temperature

    def penalized(self, plain: Tensor, begin: int, end: int) -> Tensor:
        """Add the penalties to the logits that :meth:`plain` returned for the same rows."""
        if self.hardness is None:
            return plain
        every = sum(self.rows.sizes)
        blocks = range(0, plain.shape[1], every)
        starts = [0, *blocks[1 + self.contrast_anchors + self.contrast_positives :]]
        own = self.rows.own(begin, end, plain.device)
        return plain + self.hardness.penalties(plain.detach() * self.temperature, own, starts, every)

    def contrasted(self, begin: int, end: int) -> Tensor:
        """Compute the logits of the contrastive term; for arguments and shape see :meth:`plain`."""
        return self.penalized(self.plain(begin, end), begin, end)
