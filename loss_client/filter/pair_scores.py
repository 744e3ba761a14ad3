"""PairScores: scores of some pairs of a grid, stored as a sorted list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class QuerySums:
    """Sums over the scored pairs of each query, each of shape ``(queries,)``.

    Attributes:
        documents: Number of documents with a score, each as often as it occurs.
        scores: Sum of their scores.
        highest: Highest score of a document that occurs, minus infinity without one.
    """

    documents: NDArray[np.float64]
    scores: NDArray[np.float64]
    highest: NDArray[np.float32]


class PairScores:
    """Scores of some pairs of a grid.

    A pair's code is ``query * documents + document``.

    Args:
        queries: Number of queries of the grid.
        documents: Number of documents of the grid.

    Attributes:
        queries: Number of queries of the grid.
    """

    def __init__(self, queries: int, documents: int) -> None:
        self.queries = queries
        self._documents = documents
        self._codes = np.empty(0, dtype=np.int64)
        self._scores = np.empty(0, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, codes: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Add scores of pairs that have none yet; codes and scores have the shape ``(pairs,)``."""
        codes = np.concatenate([self._codes, codes])
        order = np.argsort(codes, kind="stable")  # merges sorted parts
        self._codes, self._scores = codes[order], np.concatenate([self._scores, scores])[order]

    def missing(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the codes without a score, sorted and distinct."""
        codes = distinct_codes(codes)
        found: NDArray[np.int64] = codes[np.isnan(self.pairs(codes))]
        return found

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (codes, scores) of all pairs with a score, sorted by code."""
        return self._codes, self._scores

    def above(self, limits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (codes, scores) of the pairs whose score is above the limit of their query; limits: ``(queries,)``."""
        chosen = self._scores > limits[self._codes // self._documents]
        return self._codes[chosen], self._scores[chosen]

    def sums(self, repeats: NDArray[np.intp]) -> QuerySums:
        """Sum up each query's scores.

        Args:
            repeats: How often each document occurs, shape ``(documents,)``.
        """
        queries, times = self._codes // self._documents, repeats[self._codes % self._documents]
        highest = np.full(self.queries, -np.inf, dtype=np.float32)
        np.maximum.at(highest, queries[times > 0], self._scores[times > 0])
        return QuerySums(
            np.bincount(queries, times.astype(np.float64), self.queries).astype(np.float64),
            np.bincount(queries, times * self._scores.astype(np.float64), self.queries).astype(np.float64),
            highest,
        )

    def rows(self, queries: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the scores of some queries, NaN where there is none, shape ``(len(queries), documents)``."""
        found = np.full((len(queries), self._documents), np.nan, dtype=np.float32)
        begins = np.searchsorted(self._codes, queries * self._documents)
        counts = np.searchsorted(self._codes, (queries + 1) * self._documents) - begins
        lines = np.repeat(np.arange(len(queries)), counts)
        places = np.arange(len(lines)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        found[lines, self._codes[places] % self._documents] = self._scores[places]
        return found

    def pairs(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the scores of single pairs, NaN where there is none, in the shape of ``codes``."""
        if not len(self._codes):
            return np.full(codes.shape, np.nan, dtype=np.float32)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[at] == codes, self._scores[at], np.float32(np.nan))


def distinct_codes(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the distinct codes, sorted; several times as fast as ``np.unique``, which hashes integers first."""
    codes = np.sort(codes)
    return codes[np.append(True, codes[1:] != codes[:-1])] if len(codes) else codes
