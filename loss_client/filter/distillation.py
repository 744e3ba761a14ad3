"""Distillation: settings by which the guide's scores become targets of the student's similarities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from loss_client.filter.targets import DistillOver

DistillTarget = Literal["kl", "bce", "margin_mse"]
"""Form of the distillation term; see :class:`Distillation`."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """A term that teaches the student the guide's scores, beside the contrastive term of the loss.

    The loss is ``contrastive + weight * term``; both are means over the anchors. The filter's mask does not apply to
    the term: false negatives stay in it, because their scores say how relevant they are. A text that occurs more than
    once counts once.

    With ``target="kl"`` the term of an anchor is KL(p || q): p is the softmax of the guide's raw scores over
    ``temperature``, q the softmax of the student's cosines over the loss's own temperature, both over the documents
    that have a score. With ``target="margin_mse"`` it is the mean over the other documents of ``(student margin - guide
    margin) ** 2``. A margin is the positive's number less the document's; the student's numbers are cosines over the
    loss's temperature, the guide's are raw scores over ``temperature``. With ``target="bce"`` it is the mean over the
    documents of the binary cross-entropy between the guide's probability and ``sigmoid(scale * cosine + bias)``.

    Args:
        weight: Factor of the term.
        target: ``"kl"``, ``"margin_mse"`` or ``"bce"``.
        over: ``"batch"``: all documents of the batch that have a score. ``"row"``: the documents of the anchor's own
            row, which needs a column of negatives unless ``target="bce"``.
        temperature: Divisor of the guide's raw scores. ``"auto"``: set from the scores of the first steps of training,
            see ``entropy``. Not used by ``"bce"``.
        entropy: With ``temperature="auto"``, the mean entropy that p shall have, as a share of the largest possible
            one, the logarithm of the number of documents. With the cosines of MiniLM, 0.3 gives temperatures of 0.04
            for two documents, 0.07 for 29, 0.05 for 200 and for 300: the middle of the range 0.03 to 0.1, in which
            models trained equally well.
        scale: Factor of the cosine, with ``target="bce"``. The loss learns no parameters of its own.
        bias: Summand beside it.

    Raises:
        ValueError: A value is out of range.
    """

    weight: float = 1.0
    target: DistillTarget = "kl"
    over: DistillOver = "batch"
    temperature: float | Literal["auto"] = "auto"
    entropy: float = 0.3
    scale: float = 20.0
    bias: float = -10.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be a finite number, 0 or more, not {self.weight!r}.")
        for name, choices in (("target", get_args(DistillTarget)), ("over", get_args(DistillOver))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {getattr(self, name)!r}.")
        if self.temperature != "auto" and not (
            isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf
        ):
            raise ValueError(f"temperature must be 'auto' or a finite number above 0, not {self.temperature!r}.")
        if not 0 < self.entropy < 1:
            raise ValueError(f"entropy must be between 0 and 1, not {self.entropy!r}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, not {self.scale!r}.")
        if not math.isfinite(self.bias):
            raise ValueError(f"bias must be a finite number, not {self.bias!r}.")

    @property
    def calibrates(self) -> bool:
        """Whether the temperature is set from the first scores."""
        return self.temperature == "auto" and self.target != "bce"

    def check_columns(self, columns: int) -> None:
        """Raise ``ValueError`` if a batch of so many columns, anchors included, makes the term constant."""
        if self.over == "row" and self.target != "bce" and columns < 3:
            raise ValueError(
                f"Distillation(target={self.target!r}, over='row') needs at least two documents in each row, but the "
                f"batch has {columns} columns. Over one document the term is constant. Add a column of negatives, or "
                "use over='batch'."
            )
