"""Layout: the pairs of texts that decide each candidate of a step, and the candidates that each pair decides.

A candidate is one entry of the loss's logits: its line is a local row, and its column is one of the documents. Columns
come in blocks of one column for each row of all ranks: the positives, the blocks of contrast terms, then the columns of
negatives. A step with scores for few pairs keeps lists of candidates, as long as the scored part of the batch. The code
of a candidate is ``line * columns + column``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loss_client.filter.equal_anchors import EqualAnchors
from loss_client.filter.pair_scores import PairScores, distinct_codes
from loss_client.filter.positions import Positions


@dataclass(frozen=True, slots=True)
class Block:
    """One column for each row of all ranks.

    Attributes:
        documents: Ids of the columns' documents, shape ``(rows of all ranks,)``.
        queries: Ids of the lines' queries, shape ``(lines,)``: a candidate is decided by the score of its line's query
            with its column's document. ``None``: it is decided by the relation of its line's row with its column's row;
            see :func:`loss_client.filter.masking.related`.
        anchors: Whether the columns stand for anchors: those with the text of the line's anchor are always masked.
    """

    documents: NDArray[np.intp]
    queries: NDArray[np.intp] | None
    anchors: bool = False


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Scores above which a negative is dropped; NaN for a row without one.

    Attributes:
        lines: Of the local rows, shape ``(lines,)``.
        every: Of the rows of all ranks, shape ``(rows of all ranks,)``. ``None`` if no candidate is decided by a
            relation.
    """

    lines: NDArray[np.float32]
    every: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class _Family:
    """Blocks whose lines have the same queries."""

    queries: NDArray[np.intp]  # (lines,)
    lines_of: Positions
    columns: NDArray[np.intp]
    columns_of: Positions


class Layout:
    """Lists candidates of pairs, and pairs of candidates.

    Args:
        blocks: The blocks, positives first.
        queries: Ids of the anchors of all ranks as queries, shape ``(rows of all ranks,)``. ``None`` if no candidate is
            decided by a relation.
        anchor_ids: Ids that are equal if and only if the anchors' texts are, shape ``(rows of all ranks,)``.
        equal_anchors: The rows with equal anchors.
        own: The lines' numbers among the rows of all ranks, shape ``(lines,)``.
        shape: Number of ids of queries, and of documents.

    Attributes:
        columns: Number of columns.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        queries: NDArray[np.intp] | None,
        anchor_ids: NDArray[np.intp],
        equal_anchors: EqualAnchors,
        own: NDArray[np.intp],
        shape: tuple[int, int],
    ) -> None:
        every = len(anchor_ids)
        self.columns = len(blocks) * every
        self._every, self._queries, self._documents = every, queries, shape[1]
        self._own_documents = blocks[0].documents[own]
        self._own_codes = np.arange(len(own)) * self.columns + own
        self._column_documents = np.concatenate([block.documents for block in blocks])
        self._families: list[_Family] = []
        self._family_of = np.zeros(len(blocks), dtype=np.intp)
        self._related_blocks = [number for number, block in enumerate(blocks) if block.queries is None]
        for asking in {id(block.queries): block.queries for block in blocks if block.queries is not None}.values():
            numbers = [number for number, block in enumerate(blocks) if block.queries is asking]
            self._family_of[numbers] = len(self._families)
            columns = np.concatenate([np.arange(number * every, (number + 1) * every) for number in numbers])
            columns_of = Positions(self._column_documents[columns], shape[1])
            self._families.append(_Family(asking, Positions(asking, shape[0]), columns, columns_of))
        if queries is not None:
            self._rows_of_query = Positions(queries, shape[0])
            self._rows_of_positive = Positions(blocks[0].documents, shape[1])
            self._lines_of_positive = Positions(self._own_documents, shape[1])
        self._given = self._equal_texts(blocks, anchor_ids, equal_anchors, own)

    def _equal_texts(
        self,
        blocks: Sequence[Block],
        anchor_ids: NDArray[np.intp],
        equal_anchors: EqualAnchors,
        own: NDArray[np.intp],
    ) -> NDArray[np.int64]:
        """Return the codes of the candidates that are masked whatever their scores are, because texts are equal."""
        lines, found = np.arange(len(own)), []
        others, documents = equal_anchors.positives(own)
        marked, marked_documents = np.concatenate([lines, others]), np.concatenate([self._own_documents, documents])
        for number, family in enumerate(self._families):
            # A positive as a query has no rows with an equal anchor.
            named, texts = (lines, self._own_documents) if number else (marked, marked_documents)
            which, places = family.columns_of.of(texts)
            found.append(named[which] * self.columns + family.columns[places])
        which, rows = Positions(anchor_ids, int(anchor_ids.max()) + 1).of(anchor_ids[own])
        same_anchors = which * self.columns + rows
        for number, block in enumerate(blocks):
            if block.anchors or block.queries is None:
                found.append(same_anchors + number * self._every)
        if self._related_blocks:
            which, rows = self._rows_of_positive.of(marked_documents)
            holding, holders = equal_anchors.holders(self._own_documents)
            related = np.concatenate([marked[which] * self.columns + rows, holding * self.columns + holders])
            found += [related + number * self._every for number in self._related_blocks]
        return np.unique(np.concatenate(found))

    def pairs(self, lines: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the codes of the pairs whose scores decide candidates, shape ``(candidates,)``.

        For a candidate that is decided by a relation, the pair is its line's anchor with its column's positive.
        """
        queries = self._families[0].queries[lines]
        for number, family in enumerate(self._families[1:], 1):
            asked = self._family_of[columns // self._every] == number
            queries = np.where(asked, family.queries[lines], queries)
        codes: NDArray[np.int64] = queries * self._documents + self._column_documents[columns]
        return codes

    def back_pairs(
        self, lines: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
        """Return the second pairs of candidates that are decided by a relation.

        Returns:
            (position of each such candidate in the lists, its column's row, code of the pair of that row's anchor with
            its line's positive), each of shape ``(such candidates,)``.
        """
        if self._queries is None:
            return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        at = np.flatnonzero(np.isin(columns // self._every, self._related_blocks))
        rows = columns[at] % self._every
        return at, rows, self._queries[rows] * self._documents + self._own_documents[lines[at]]

    def look_up(
        self, lines: NDArray[np.int64], columns: NDArray[np.int64], scores: PairScores, limits: Thresholds
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return (decided, masked) by scores for a list of candidates, each of shape ``(candidates,)``."""
        values, limit = scores.pairs(self.pairs(lines, columns)), limits.lines[lines]
        masked = values > limit  # a comparison with NaN is false
        decided = ~np.isnan(values) & ~np.isnan(limit)
        at, rows, codes = self.back_pairs(lines, columns)
        if limits.every is not None and len(at):
            back, limit = scores.pairs(codes), limits.every[rows]
            masked[at] |= back > limit
            decided[at] = masked[at] | (decided[at] & ~np.isnan(back) & ~np.isnan(limit))
        return decided, masked

    def masked(self, scores: PairScores, limits: Thresholds) -> NDArray[np.int64]:
        """Return the codes of all masked candidates, sorted and distinct."""
        found = [self._given]
        for codes, above in self._candidates(scores, limits, kept=False):
            found.append(codes[above])
        codes = distinct_codes(np.concatenate(found))
        return codes[~_among(codes, self._own_codes)]

    def kept(self, scores: PairScores, limits: Thresholds, masked: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the codes of all candidates that are known to be kept, sorted and distinct.

        Args:
            scores: The scores so far.
            limits: The thresholds.
            masked: The codes of all masked candidates.
        """
        found = [self._own_codes]
        for codes, above in self._candidates(scores, limits, kept=True):
            found.append(codes[~above])
        codes = distinct_codes(np.concatenate(found))
        return codes[~_among(codes, masked)]

    def _candidates(
        self, scores: PairScores, limits: Thresholds, kept: bool
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield (codes of candidates that scores decide, whether each is masked); a code may come several times.

        Args:
            scores: The scores so far.
            limits: The thresholds.
            kept: Whether candidates that are kept are needed too.
        """
        for family in self._families:
            codes, values = scores.entries() if kept else scores.above(_lowest(family.queries, limits.lines, scores))
            which, lines = family.lines_of.of(codes // self._documents)
            limit = limits.lines[lines]
            above = values[which] > limit
            use = ~np.isnan(limit) if kept else above
            which, lines, above = which[use], lines[use], above[use]
            each, places = family.columns_of.of(codes[which] % self._documents)
            yield lines[each] * self.columns + family.columns[places], above[each]
        if self._queries is None or limits.every is None:
            return
        codes, values = scores.entries()
        queries, documents = codes // self._documents, codes % self._documents
        which, lines = self._families[0].lines_of.of(queries)
        each, rows = self._rows_of_positive.of(documents[which])
        forth = self._relations(lines[each], rows, values[which[each]], limits.lines[lines[each]])
        which, rows = self._rows_of_query.of(queries)
        each, lines = self._lines_of_positive.of(documents[which])
        back = self._relations(lines, rows[each], values[which[each]], limits.every[rows[each]])
        both = np.intersect1d(forth[0], back[0])
        masked = np.union1d(forth[1], back[1])
        for number in self._related_blocks:
            yield masked + number * self._every, np.ones(len(masked), dtype=np.bool_)
            yield both + number * self._every, np.zeros(len(both), dtype=np.bool_)

    def _relations(
        self,
        lines: NDArray[np.intp],
        rows: NDArray[np.intp],
        values: NDArray[np.float32],
        limits: NDArray[np.float32],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the codes, in the first block, of (relations with a score and a threshold, those above it)."""
        codes = lines * self.columns + rows
        return codes[~np.isnan(limits)], codes[values > limits]


def _lowest(queries: NDArray[np.intp], limits: NDArray[np.float32], scores: PairScores) -> NDArray[np.float32]:
    """Return the lowest threshold of the lines with each query, infinite for a query without a line."""
    lowest = np.full(scores.queries, np.inf, dtype=np.float32)
    np.fmin.at(lowest, queries, limits)
    return lowest


def _among(codes: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of ``codes`` are among ``others``, which are sorted and distinct."""
    if not len(others):
        return np.zeros(len(codes), dtype=np.bool_)
    found: NDArray[np.bool_] = others[np.minimum(np.searchsorted(others, codes), len(others) - 1)] == codes
    return found
