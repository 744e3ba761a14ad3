"""Distillation: settings by which the guide's scores become targets of the student's similarities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Distillation:
    """A term that teaches the student the guide's scores, beside the contrastive term of the loss.

    The loss is ``contrastive + weight * term``; both are means over the anchors. The filter's mask does not apply to
    the term: false negatives stay in it, because their scores say how relevant they are. A text that occurs more than
    once counts once.

    The term of an anchor is KL(p || q): p is the softmax of the guide's raw scores over ``temperature``, q the softmax
    of the student's cosines over the loss's own temperature, both over all documents of the batch that have a score.

    Args:
        weight: Factor of the term.
        temperature: Divisor of the guide's raw scores. ``"auto"``: set from the scores of the first steps of training,
            see ``entropy``.
        entropy: With ``temperature="auto"``, the mean entropy that p shall have, as a share of the largest possible
            one, the logarithm of the number of documents. With the cosines of MiniLM, 0.3 gives temperatures of 0.04
            for two documents, 0.07 for 29, 0.05 for 200 and for 300: the middle of the range 0.03 to 0.1, in which
            models trained equally well.

    Raises:
        ValueError: A value is out of range.
    """

    weight: float = 1.0
    temperature: float | Literal["auto"] = "auto"
    entropy: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be a finite number, 0 or more, not {self.weight!r}.")
        if self.temperature != "auto" and not (
            isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf
        ):
            raise ValueError(f"temperature must be 'auto' or a finite number above 0, not {self.temperature!r}.")
        if not 0 < self.entropy < 1:
            raise ValueError(f"entropy must be between 0 and 1, not {self.entropy!r}.")

    @property
    def calibrates(self) -> bool:
        """Whether the temperature is set from the first scores."""
        return self.temperature == "auto"
