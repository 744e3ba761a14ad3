"""Targets: the guide's scores of some rows, and where their documents are among the candidates of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

DistillOver = Literal["row", "batch"]
"""Documents whose scores are targets; see ``Distillation``."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The guide's scores of some rows with K documents each.

    Attributes:
        columns: Position of each document among the candidates of the logits, shape ``(rows, K)``.
        scores: Raw scores, NaN for a document without a score and for the repetition of a text, shape ``(rows, K)``.
        own: Position of each row's own positive among the K documents, shape ``(rows,)``.
    """

    columns: NDArray[np.intp]
    scores: NDArray[np.float32]
    own: NDArray[np.intp]


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

    def of_row(self, own: NDArray[np.intp], scores: NDArray[np.float32]) -> Targets:
        """Return the targets over the documents of each anchor's own row.

        Args:
            own: Numbers of rows among the rows of all ranks, shape ``(rows,)``.
            scores: Scores of :meth:`row_ids`, shape ``(rows, columns)``.
        """
        ids = self.row_ids(own)
        repeated = np.zeros(ids.shape, dtype=np.bool_)
        for column in range(1, ids.shape[1]):
            repeated[:, column] = (ids[:, :column] == ids[:, column : column + 1]).any(axis=1)
        return Targets(
            own[:, None] + np.array(self._starts), np.where(repeated, np.float32(np.nan), scores), np.zeros_like(own)
        )

    def row_ids(self, own: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the ids of each row's own documents, shape ``(rows, columns)``."""
        return np.stack([column[own] for column in self._ids], axis=1)

    def of_batch(self, own: NDArray[np.intp], scores: NDArray[np.float32]) -> Targets:
        """Return the targets over all documents.

        Args:
            own: Numbers of rows among the rows of all ranks, shape ``(rows,)``.
            scores: Scores of all ids, NaN where there is none, shape ``(rows, documents)``.
        """
        present = np.flatnonzero(self._first >= 0)
        return Targets(self.columns(own)[:, present], scores[:, present], np.searchsorted(present, self._ids[0][own]))
