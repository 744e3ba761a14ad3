"""Distillation term: pure functions from the student's logits and the guide's scores to one number for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Guide:
    """The guide's distributions over the documents of some rows, in the number format of the scores.

    Attributes:
        scored: Where there is a score, shape ``(rows, K)``.
        log_probabilities: Logarithms of the distributions, 0 where there is no score, shape ``(rows, K)``.
        probabilities: The distributions, 0 where there is no score, shape ``(rows, K)``.
    """

    scored: Tensor
    log_probabilities: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, scores: Tensor, temperature: float) -> Guide:
        """Return the softmax of scores over a temperature; scores that are NaN have no part in it."""
        scored = ~scores.isnan()
        logarithms = log_softmax(torch.where(scored, scores, 0) / temperature, scored)
        return cls(scored, logarithms, logarithms.exp().masked_fill(~scored, 0))

    @property
    def entropies(self) -> Tensor:
        """Entropy of each row's distribution in nats, shape ``(rows,)``; 0 for a row without scores."""
        return -(self.probabilities * self.log_probabilities).sum(1)

    @property
    def underflows(self) -> Tensor:
        """Number of documents whose probability is exactly 0, a scalar."""
        return (self.scored & (self.probabilities == 0)).sum()

    def divergences(self, student: Tensor) -> Tensor:
        """Return KL(guide || student) of each row, shape ``(rows,)``.

        Args:
            student: The student's logits of the same documents, shape ``(rows, K)``.
        """
        # Products with a logarithm, not with a quotient: a probability of 0 then gives 0.
        return (self.probabilities * (self.log_probabilities - log_softmax(student, self.scored))).sum(1)


def log_softmax(logits: Tensor, among: Tensor) -> Tensor:
    """Return the logarithms of the softmax over the entries ``among``, and 0 elsewhere; both of shape ``(rows, K)``."""
    # A finite number, because a row without any entry would otherwise have the gradient NaN.
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~among, lowest).log_softmax(1).masked_fill(~among, 0)
