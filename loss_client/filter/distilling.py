"""Distillation terms: pure functions from the student's logits and the guide's scores to one number for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Guide:
    """The guide's distributions over the documents of some rows, in the number format of the scores.

    Attributes:
        scored: Where there is a score, shape ``(rows, K)``.
        logits: Scores over the temperature, 0 where there is none, shape ``(rows, K)``.
        log_probabilities: Logarithms of the distributions, 0 where there is no score, shape ``(rows, K)``.
        probabilities: The distributions, 0 where there is no score, shape ``(rows, K)``.
    """

    scored: Tensor
    logits: Tensor
    log_probabilities: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, scores: Tensor, temperature: float) -> Guide:
        """Return the softmax of scores over a temperature; scores that are NaN have no part in it."""
        scored = ~scores.isnan()
        logits = torch.where(scored, scores, 0) / temperature
        logarithms = log_softmax(logits, scored)
        return cls(scored, logits, logarithms, logarithms.exp().masked_fill(~scored, 0))

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

    def margin_errors(self, student: Tensor, own: Tensor) -> Tensor:
        """Return for each row the mean squared difference of student's and guide's margins, shape ``(rows,)``.

        A margin is the logit of the row's own positive less that of another document.

        Args:
            student: The student's logits of the same documents, shape ``(rows, K)``.
            own: Position of each row's own positive among the K documents, shape ``(rows,)``.
        """
        apart = student - self.logits
        errors = (apart.gather(1, own[:, None]) - apart).square()
        others = self.scored.scatter(1, own[:, None], False)
        return errors.masked_fill(~others, 0).sum(1) / others.sum(1).clamp(min=1)


def graded_cross_entropies(student: Tensor, probabilities: Tensor) -> Tensor:
    """Return for each row the mean binary cross-entropy of the student with graded labels, shape ``(rows,)``.

    Args:
        student: Logits of the student's probabilities, shape ``(rows, K)``.
        probabilities: The guide's, NaN where there is none, same shape.
    """
    scored = ~probabilities.isnan()
    targets = torch.where(scored, probabilities, 0)
    errors = functional.binary_cross_entropy_with_logits(student, targets, reduction="none")
    return errors.masked_fill(~scored, 0).sum(1) / scored.sum(1).clamp(min=1)


def log_softmax(logits: Tensor, among: Tensor) -> Tensor:
    """Return the logarithms of the softmax over the entries ``among``, and 0 elsewhere; both of shape ``(rows, K)``."""
    # A finite number, because a row without any entry would otherwise have the gradient NaN.
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~among, lowest).log_softmax(1).masked_fill(~among, 0)
