"""Distiller: the distillation term of some rows of a step, and the guide's temperature that it needs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import get_rank
from torch import Tensor

from loss_client.filter.calibration import ROWS, STEPS, Calibration, entropy_sums, temperature_of
from loss_client.filter.distillation import Distillation
from loss_client.filter.distilling import Guide
from loss_client.filter.gather import sum_over_ranks
from loss_client.filter.step import FilterStep

logger = logging.getLogger(__name__)


class Distiller:
    """Computes the distillation term, and sets the guide's temperature from the scores of the first training steps."""

    def __init__(self) -> None:
        self._calibration = Calibration()
        self._warned = False

    def temperature(self, settings: Distillation) -> float | None:
        """Return the guide's temperature as far as it is known; ``None`` before the first step."""
        return self._calibration.temperature(settings.entropy) if settings.calibrates else float(settings.temperature)

    def state(self) -> dict[str, Any]:
        """Return the calibration's state, a dict that can be written as JSON."""
        return self._calibration.state()

    def load(self, state: dict[str, Any]) -> None:
        """Take a state that ``state`` returned; raises ``ValueError`` for another one."""
        self._calibration.load(state)

    def set_temperature(
        self, settings: Distillation, step: FilterStep, rows: int, device: torch.device, training: bool
    ) -> None:
        """Set the guide's temperature in a step, unless it has been set.

        Args:
            settings: The settings.
            step: The step, all of whose pairs have been asked for.
            rows: Number of local rows.
            device: Device of the model.
            training: Whether the step's scores may set the temperature of later steps. Then every rank has to call.
        """
        if step.temperature is not None:
            return
        if not settings.calibrates:
            step.temperature = self.temperature(settings)
        elif training and not self._calibration.frozen:
            self._calibration.add(sum_over_ranks(entropy_sums(step.targets(0, min(rows, ROWS)).scores), device))
            step.temperature = self.temperature(settings)
            if self._calibration.frozen and get_rank() == 0:
                logger.info(
                    "The guide's temperature is %.4g from now on: in the first %d steps its distributions had a mean "
                    "entropy of %g of the largest possible one.",
                    *(step.temperature, STEPS, settings.entropy),
                )
        else:
            step.temperature = self.temperature(settings)
            if step.temperature is None:  # evaluation before training: a temperature for this batch alone
                sums = entropy_sums(step.targets(0, min(rows, ROWS)).scores)
                step.temperature = temperature_of(sums, settings.entropy)
        # Without two scores in any row there is no distribution that a temperature could change.
        step.temperature = step.temperature or 1.0

    @staticmethod
    def loss(step: FilterStep, begin: int, end: int, logits: Tensor) -> Tensor:
        """Return the sum of the distillation term over some rows, without its weight, a scalar.

        Args:
            step: The step, whose temperature has been set.
            begin: First local row.
            end: The local row after the last.
            logits: The student's logits of these rows, shape ``(end - begin, candidates)``.
        """
        targets, device = step.targets(begin, end), logits.device
        student = logits.gather(1, torch.from_numpy(targets.columns).to(device))
        guide = Guide.of(torch.from_numpy(targets.scores).to(device, logits.dtype), step.temperature or 1.0)
        total = guide.divergences(student).sum()
        counted = int(np.isfinite(targets.scores).any(axis=1).sum())
        sums = [total.new_tensor(counted), total, guide.entropies.sum(), guide.underflows]
        step.count_distilled(begin, end, torch.stack([value.detach().to(logits.dtype) for value in sums]))
        return total

    def check_underflow(self, step: FilterStep, name: str) -> None:
        """Warn once, in the name of a loss, if some of a step's probabilities are exactly 0."""
        if self._warned or not step.underflows:
            return
        self._warned = True
        logger.warning(
            "%s: a distillation temperature of %g underflows %d of the guide's scores in a batch to exactly zero, so "
            "those documents carry no information about their order. A float32 softmax underflows once a row's spread "
            "divided by the temperature exceeds about 100. Raise the temperature above a hundredth of the spread.",
            *(name, step.temperature, step.underflows),
        )
