"""PairScores: scores of some pairs of a grid, stored as a sorted list."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class PairScores:
    """Scores of some pairs of a grid.

    A pair's code is ``query * documents + document``.

    Args:
        queries: Number of queries of the grid.
        documents: Number of documents of the grid.
    """

    def __init__(self, queries: int, documents: int) -> None:
        self._queries = queries
        self._documents = documents
        self._codes = np.empty(0, dtype=np.int64)
        self._scores = np.empty(0, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, codes: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Add scores of pairs that have none yet; codes and scores have the shape ``(pairs,)``."""
        codes = np.concatenate([self._codes, codes])
        order = np.argsort(codes)
        self._codes, self._scores = codes[order], np.concatenate([self._scores, scores])[order]

    def missing(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the codes without a score, sorted and distinct."""
        return np.setdiff1d(codes, self._codes)

    def rows(self, queries: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the scores of some queries, NaN where there is none, shape ``(len(queries), documents)``."""
        found = np.full((len(queries), self._documents), np.nan, dtype=np.float32)
        begins = np.searchsorted(self._codes, queries * self._documents)
        ends = np.searchsorted(self._codes, (queries + 1) * self._documents)
        for line, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            found[line, self._codes[begin:end] % self._documents] = self._scores[begin:end]
        return found

    def columns(self, documents: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the scores of some documents, NaN where there is none, shape ``(queries, len(documents))``."""
        distinct, place = np.unique(documents, return_inverse=True)
        position = np.full(self._documents, -1, dtype=np.int64)
        position[distinct] = np.arange(len(distinct))
        at = position[self._codes % self._documents]
        found = np.full((self._queries, len(distinct)), np.nan, dtype=np.float32)
        found[self._codes[at >= 0] // self._documents, at[at >= 0]] = self._scores[at >= 0]
        return found[:, place.reshape(-1)]

    def pairs(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the scores of single pairs, NaN where there is none, in the shape of ``codes``."""
        if not len(self._codes):
            return np.full(codes.shape, np.nan, dtype=np.float32)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._scores[at], np.float32(np.nan))
