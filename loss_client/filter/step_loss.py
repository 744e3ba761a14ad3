"""StepLoss: value and gradients of one step's loss, one mini-batch of anchors at a time as their scores arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import trange  # type: ignore[import-untyped]

from loss_client.filter.contrast import Hardness, contrastive_loss
from loss_client.filter.distillation import Distillation
from loss_client.filter.distiller import Distiller
from loss_client.filter.logits import CandidateLogits, gathered_units
from loss_client.filter.step import FilterStep


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The contrastive term over the candidates that the filter keeps, plus the distillation term.

    Attributes:
        temperature: Divisor of the cosines.
        mini_batch_size: Number of anchors whose loss is computed at a time.
        contrast_anchors: Whether the other anchors are negatives of an anchor too.
        contrast_positives: Whether the other positives are negatives of the anchor's positive too.
        hardness: Penalties on the logits of negatives; ``None`` for none.
        distillation: Settings of the distillation term; ``None`` for no such term.
        distiller: Computes the distillation term.
        show_progress_bar: Whether to show a progress bar over the mini-batches.
    """

    temperature: float
    mini_batch_size: int
    contrast_anchors: bool
    contrast_positives: bool
    hardness: Hardness | None
    distillation: Distillation | None
    distiller: Distiller
    show_progress_bar: bool

    def calculate(self, reps: Sequence[Sequence[Tensor]], step: FilterStep, training: bool, backward: bool) -> Tensor:
        """Compute the mean loss over the anchors, a scalar.

        Args:
            reps: Embeddings by column and mini-batch, each of shape ``(mini_batch_size, dim)``.
            step: The step, which has been settled.
            training: Whether the step's scores may set the guide's temperature of later steps.
            backward: Whether to back-propagate to ``reps`` and return the loss detached.
        """
        size, device = step.rows.sizes[step.rows.rank], reps[0][0].device
        # float32, because bfloat16 has too few digits for cosines that are divided by a small temperature.
        with torch.autocast(device.type, enabled=False):
            roots = gathered_units(reps, step.rows, self.contrast_anchors)
            # Each mini-batch back-propagates to the leaves; the collectives of the roots run backward only once.
            leaves = [root.detach().requires_grad_() for root in roots] if backward else roots
            logits = CandidateLogits(
                leaves, step.rows, self.temperature, self.contrast_anchors, self.contrast_positives, self.hardness
            )

            with torch.no_grad():
                step.select(self.mini_batch_size, logits.contrasted)
                if self.distillation is not None:
                    self.distiller.set_temperature(self.distillation, step, size, device, training)
            total = torch.zeros((), device=device)
            for begin in trange(
                0, size, self.mini_batch_size, desc="Calculating loss", disable=not self.show_progress_bar
            ):
                end = min(begin + self.mini_batch_size, size)
                loss = self._rows_loss(logits, step, begin, end) / step.rows.mean_size
                if backward:
                    loss.backward()  # type: ignore[no-untyped-call]
                    loss = loss.detach()
                total = total + loss
            if backward:
                torch.autograd.backward(roots, [leaf.grad for leaf in leaves])
        return total

    def _rows_loss(self, logits: CandidateLogits, step: FilterStep, begin: int, end: int) -> Tensor:
        """Compute the summed loss of the anchors from ``begin`` to ``end``."""
        plain = logits.plain(begin, end)
        mask = torch.from_numpy(step.mask(begin, end)).to(plain.device)
        contrasted = logits.penalized(plain, begin, end)
        step.observe(begin, end, contrasted.detach())
        loss = contrastive_loss(contrasted, step.rows.own(begin, end, plain.device), mask)
        if self.distillation is not None:
            loss = loss + self.distillation.weight * self.distiller.loss(step, begin, end, plain)
        return loss
