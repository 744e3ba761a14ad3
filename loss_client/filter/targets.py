"""Targets: the guide's scores of some rows, and where their documents are among the candidates of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Targets:
    """The guide's scores of some rows with K documents each.

    Attributes:
        columns: Position of each document among the candidates of the logits, shape ``(rows, K)``.
        scores: Raw scores, NaN for a document without a score, shape ``(rows, K)``.
    """

    columns: NDArray[np.intp]
    scores: NDArray[np.float32]


class Places:
    """Positions of documents among the candidates of the logits, one for each distinct text.

    Candidates are in the order of the loss's logits: positives, the blocks of contrast terms, then the columns of
    negatives. A text is represented by its occurrence among the row's own documents, or else by its first one.

    Args:
        ids: Ids of the documents by column, positives first, each of shape ``(rows of all ranks,)``.
        documents: Number of ids.
        contrast_blocks: Number of blocks of contrast terms.
    """

    def __init__(self, ids: Sequence[NDArray[np.intp]], documents: int, contrast_blocks: int) -> None:
        every = len(ids[0])
        self._ids = ids
        self._starts = [0, *((number + contrast_blocks) * every for number in range(1, len(ids)))]
        self._first = np.full(documents, -1, dtype=np.intp)
        for start, column in self._backwards():
            self._first[column[::-1]] = np.arange(start, start + every)[::-1]

    def _backwards(self) -> list[tuple[int, NDArray[np.intp]]]:
        """Return (position of the first candidate, ids) of each column, last column first.

        Assignments in this order leave the first occurrence of each text.
        """
        return list(zip(self._starts, self._ids, strict=True))[::-1]

    def columns(self, own: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the position of each distinct text, -1 for a text that is no document.

        Args:
            own: Numbers of rows among the rows of all ranks, shape ``(rows,)``.

        Returns:
            Shape ``(rows, documents)``.
        """
        found = np.repeat(self._first[None], len(own), axis=0)
        for start, column in self._backwards():
            found[np.arange(len(own)), column[own]] = start + own
        return found

    def targets(self, own: NDArray[np.intp], scores: NDArray[np.float32]) -> Targets:
        """Return the targets over all documents.

        Args:
            own: Numbers of rows among the rows of all ranks, shape ``(rows,)``.
            scores: Scores of all ids, NaN where there is none, shape ``(rows, documents)``.
        """
        present = np.flatnonzero(self._first >= 0)
        return Targets(self.columns(own)[:, present], scores[:, present])
