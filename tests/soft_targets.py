"""Reference of the loss with soft targets: loops over the definition, which share no code with the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .training import Score

TEMPERATURE, MARGIN = 0.05, 0.1


class Reference:
    """The loss of one batch, pair by pair.

    Args:
        embedded: The columns' embeddings, each of shape ``(rows, dim)``.
        columns: Their texts.
        score: The guide's raw scores.
        known: Pairs (anchor, document) that have a score. Default: all.
    """

    def __init__(
        self,
        embedded: Sequence[Tensor],
        columns: Sequence[Sequence[str]],
        score: Score,
        known: set[tuple[str, str]] | None = None,
    ) -> None:
        self.columns = columns
        self.rows = range(len(columns[0]))
        self._units = [nn.functional.normalize(column.float()) for column in embedded]
        texts = list(dict.fromkeys(text for column in columns for text in column))
        self._table = score(texts, texts)
        self._position = {text: number for number, text in enumerate(texts)}
        self._known = known

    def score(self, row: int, document: str) -> float | None:
        anchor = self.columns[0][row]
        if self._known is not None and (anchor, document) not in self._known:
            return None
        return float(self._table[self._position[anchor], self._position[document]])

    def cosine(self, row: int, column: int, other: int) -> Tensor:
        return self._units[0][row] @ self._units[column][other]

    def labelled(self, row: int) -> set[str]:
        """Return the positives of all rows with this anchor."""
        return {self.columns[1][other] for other in self.rows if self.columns[0][other] == self.columns[0][row]}

    def documents(self, row: int) -> dict[str, tuple[int, int]]:
        """Return by text the place of each distinct document: in the row itself, or else its first one."""
        found: dict[str, tuple[int, int]] = {}
        for column in range(1, len(self.columns)):
            found.setdefault(self.columns[column][row], (column, row))
        for column in range(1, len(self.columns)):
            for other in self.rows:
                found.setdefault(self.columns[column][other], (column, other))
        return found

    def distilled(self, temperature: float = 0.3) -> Tensor:
        """Return the mean over the rows of the distillation term."""
        terms = []
        for row in self.rows:
            scored = {text: place for text, place in self.documents(row).items() if self.score(row, text) is not None}
            scores = torch.tensor([self.score(row, text) for text in scored])
            cosines = torch.stack([self.cosine(row, *place) for place in scored.values()])
            guide, student = (scores / temperature).softmax(0), (cosines / TEMPERATURE).log_softmax(0)
            terms.append(nn.functional.kl_div(student, guide, reduction="sum"))
        return torch.stack(terms).mean()

    def contrasted(self, hardness: tuple[str, float] | None = None) -> Tensor:
        """Return the mean over the rows of the contrastive term."""
        losses = []
        for row in self.rows:
            own, labelled, places = self.score(row, self.columns[1][row]), self.labelled(row), self.documents(row)
            assert own is not None
            scores = {text: self.score(row, text) for text in places}
            positive, negatives = self.cosine(row, 1, row) / TEMPERATURE, []
            for column in range(1, len(self.columns)):
                for other in self.rows:
                    text = self.columns[column][other]
                    score = scores[text]
                    if text in labelled or (score is not None and np.float32(score) > np.float32(own - MARGIN)):
                        continue
                    cosine = self.cosine(row, column, other)
                    negatives.append(cosine / TEMPERATURE)
                    hard = other == row and column > 1
                    mode, strength = hardness or ("", 0.0)
                    if mode == "all_negatives" or (mode == "hard_negatives" and hard):
                        negatives[-1] = negatives[-1] + strength * cosine.detach()
                    if mode == "in_batch_negatives" and other != row:
                        negatives[-1] = negatives[-1] + strength * cosine.detach()
            losses.append(torch.logsumexp(torch.stack([positive, *negatives]), 0) - positive)
        return torch.stack(losses).mean()

    def entropy(self, temperature: float) -> float:
        """Return the mean over the rows of the guide's entropy as a share of the largest one."""
        shares = []
        for row in self.rows:
            scores = torch.tensor([self.score(row, text) for text in self.documents(row)], dtype=torch.float64)
            if len(scores) > 1:
                p = (scores / temperature).softmax(0)
                shares.append(float(torch.special.entr(p).sum()) / math.log(len(scores)))
        return sum(shares) / len(shares)


def options_of(distillation: Any, **more: Any) -> dict[str, Any]:
    """Return the loss's options that the reference shares."""
    return {
        "temperature": TEMPERATURE,
        "margin": MARGIN,
        "score_type": "raw",
        "mini_batch_size": 3,
        "distillation": distillation,
        **more,
    }
