"""GridStep: a batch with scores for every pair, whose rows of scores become bits and are freed once they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import RerankerError
from loss_client.filter.gather import gather_flags
from loss_client.filter.interning import intern
from loss_client.filter.jobs import AskForGrid, ScoreRows
from loss_client.filter.masking import above, check_finite, related, same_id, thresholds
from loss_client.filter.nucleus import unscored_fraction
from loss_client.filter.step import FilterStep
from loss_client.filter.targets import Places, Targets
from loss_client.filter.waiting import Waiting

_BLOCK_ROWS = 256


class _Grid:
    """Scores of one query for each local row with documents that are added in parts. Equal texts are scored once.

    Attributes:
        jobs: One job for each part of the documents.
    """

    def __init__(self, queries: Sequence[str], ask: AskForGrid) -> None:
        interned = intern([queries])
        self.jobs: list[ScoreRows] = []
        self._ask = ask
        self._queries = interned.texts
        self._query_of = interned.ids[0]  # (local rows,)
        self._readers = np.bincount(self._query_of)  # number of rows that still need each query's scores
        self._positions: dict[str, int] = {}

    @property
    def documents(self) -> int:
        """Number of distinct documents."""
        return len(self._positions)

    def ids(self, columns: Iterable[Sequence[str]]) -> list[NDArray[np.intp]]:
        """Return the documents' ids by column, and begin to score new documents."""
        before = len(self._positions)
        found = [
            np.array([self._positions.setdefault(text, len(self._positions)) for text in column], dtype=np.intp)
            for column in columns
        ]
        new = list(self._positions)[before:]
        if new:
            self.jobs.append(self._ask(self._queries, new))
        return found

    def read(self, rows: NDArray[np.intp], waiting: Waiting) -> NDArray[np.float32]:
        """Wait for the scores of some local rows, shape ``(rows, documents)``; NaN for scores that are late."""
        return np.concatenate([read_rows(job, self._query_of[rows], waiting) for job in self.jobs], axis=1)

    def release(self, rows: NDArray[np.intp]) -> None:
        """Free the scores of local rows that no other row needs. Each row may be released once."""
        queries = self._query_of[rows]
        np.subtract.at(self._readers, queries, 1)
        done = np.unique(queries[self._readers[queries] == 0])
        for begin, end in _runs(done):
            for job in self.jobs:
                job.release(begin, end)


class GridStep(FilterStep):
    """See :class:`FilterStep`.

    Args:
        columns: This rank's texts by column.
        contrast: Whether pairs of anchors and pairs of positives, in this order, are filtered by scores of their own.
        ask: Begins a scoring job. The constructor calls it with each distinct text once.
    """

    def __init__(self, columns: Sequence[Sequence[str]], contrast: tuple[bool, bool], ask: AskForGrid) -> None:
        super().__init__(columns)
        self._contrast = contrast
        self._grid = _Grid(columns[0], ask)
        self._positive_grid = _Grid(columns[1], ask) if contrast[1] else None
        try:
            self._ask(columns)
        except BaseException:
            self.cancel()
            raise

    def _ask(self, columns: Sequence[Sequence[str]]) -> list[NDArray[np.intp]]:
        """Begin to score the pairs that these columns add; return ids by column, with scored anchors last."""
        # Anchors are documents of the same grid, so that a single job completes the rows in order.
        documents = [*columns[1:], columns[0]] if self._contrast[0] else columns[1:]
        try:
            ids = self._grid.ids(documents)
            if self._positive_grid is not None:
                self._positive_columns = self._positive_grid.ids([columns[1]])[0]
        finally:
            self._jobs = [*self._grid.jobs, *(self._positive_grid.jobs if self._positive_grid else [])]
        return ids

    def _begin_ahead(self, merged: Sequence[Sequence[str]]) -> None:
        self._ask(merged)

    def _lay_out(self, merged: Sequence[Sequence[str]]) -> None:
        ids = self._ask(merged)
        self._document_ids = ids[: len(merged) - 1]  # for each column (rows of all ranks,)
        self._anchor_columns = ids[-1]
        local, documents = len(self._columns[0]), self._grid.documents
        self._repeats = np.bincount(np.concatenate(self._document_ids), minlength=documents)
        # One bit for each score; the scores themselves are freed.
        self._decided = np.zeros(local, dtype=np.bool_)
        self._relevant = np.zeros((local, -(-documents // 8)), dtype=np.uint8)
        if self._positive_grid is not None:
            self._relevant_positives = np.zeros((local, -(-self._positive_grid.documents // 8)), dtype=np.uint8)
        self._related: NDArray[np.bool_] | None = None
        self._known: NDArray[np.uint8] | None = None  # bits of scores that arrived, once some are late
        self._rows_counted = 0
        settings = self._settings
        self._places = Places(self._document_ids, documents, settings.contrast_blocks)
        # Raw scores for the distillation term, which may be computed several times (MatryoshkaLoss).
        self._arrived = np.zeros(local, dtype=np.bool_)
        if settings.convert is not None:
            self._raw = np.empty((local, documents), dtype=np.float32)

    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """Return at once: all pairs are being scored."""

    def observe(self, begin: int, end: int, logits: Tensor) -> None:
        """See :meth:`FilterStep.observe`. Only with late scores does a statistic depend on the logits."""
        if self._known is None or begin < self._rows_counted:
            return
        self._rows_counted = end  # MatryoshkaLoss computes the loss of the same rows several times
        known = _unpacked(self._known[begin:end], self._grid.documents)
        own = np.arange(begin, end) + self.rows.offset
        filtered = known[np.arange(end - begin), self._document_ids[0][own]]
        blocks = [known[:, ids] for ids in self._document_ids]
        # Pairs of anchors and of positives count as without a score in rows that lack any.
        every = len(self._document_ids[0])
        contrast = np.repeat(np.all(known, axis=1, keepdims=True), every * self._settings.contrast_blocks, axis=1)
        masked = self.mask(begin, end)
        decided = np.concatenate([blocks[0], contrast, *blocks[1:]], axis=1) | masked
        shares = unscored_fraction(
            logits[filtered], *(torch.from_numpy(flags[filtered]).to(logits.device) for flags in (decided, masked))
        )
        self._counts.unscored_fraction += float(shares.sum())

    def mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """See :meth:`FilterStep.mask`."""
        self._decide(begin, end)
        own = np.arange(begin, end) + self.rows.offset  # (end - begin,) columns of the anchors' own positives
        relevant = _unpacked(self._relevant[begin:end], self._grid.documents)
        blocks = [relevant[:, ids] for ids in self._document_ids]
        blocks[0][np.arange(end - begin), own] = False
        contrast: list[NDArray[np.bool_]] = []
        settings = self._settings
        if settings.contrast_filter == "known":
            repeats = settings.contrast_anchors + settings.contrast_positives
            contrast = [self._related_rows()[own]] * repeats if repeats else []
        else:
            if settings.contrast_anchors:
                same = same_id(self._anchor_ids[own], self._anchor_ids)
                contrast.append(relevant[:, self._anchor_columns] | same)
            if self._positive_grid is not None:
                columns = self._positive_columns
                found = _unpacked(self._relevant_positives[begin:end], self._positive_grid.documents)
                contrast.append(found[:, columns] | same_id(columns[own], columns))
        return np.concatenate([blocks[0], *contrast, *blocks[1:]], axis=1)

    def targets(self, begin: int, end: int) -> Targets:
        """See :meth:`FilterStep.targets`."""
        self._decide(begin, end)
        own = np.arange(begin, end) + self.rows.offset
        scores = np.where(self._arrived[begin:end, None], self._raw[begin:end], np.float32(np.nan))
        return self._places.targets(own, scores)

    def _decide(self, begin: int, end: int) -> None:
        """Turn the scores of rows into bits, if that has not been done, and free the scores."""
        rows = np.arange(begin, end)[~self._decided[begin:end]]
        if not len(rows):
            return
        lines, positives = np.arange(len(rows)), self._document_ids[0][rows + self.rows.offset]
        relevant = np.zeros((len(rows), self._grid.documents), dtype=np.bool_)
        if self.error is None:
            try:
                relevant |= self._compare(rows, positives)
            except RerankerError as error:
                self._failed(error)
        # Documents with the positive's text have the positive's id, and are masked whatever the margin is.
        relevant[lines, positives] = True
        self._equal_anchors.mark(relevant, rows + self.rows.offset)
        self._relevant[rows] = np.packbits(relevant, axis=1)
        self._decided[rows] = True
        self._counts.negatives += len(rows) * (int(self._repeats.sum()) - 1)
        self._counts.masked_negatives += int((relevant @ self._repeats).sum()) - len(rows)

    def _compare(self, rows: NDArray[np.intp], positives: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return which documents score above each row's threshold.

        Args:
            rows: Local rows.
            positives: The id of each row's own positive.
        """
        settings, counts, lines = self._settings, self._counts, np.arange(len(rows))
        raw = self._grid.read(rows, self._waiting)  # (rows, distinct documents)
        scores = self._in_units(raw)
        own_scores = scores[lines, positives]
        limits = thresholds(own_scores, settings.margin, settings.margin_strategy)
        relevant = self._above(scores, limits)
        if self._positive_grid is not None:
            found = self._above(self._in_units(self._positive_grid.read(rows, self._waiting)), limits)
            self._relevant_positives[rows] = np.packbits(found, axis=1)
            self._positive_grid.release(rows)
        self._grid.release(rows)
        outscoring = (scores > own_scores[:, None]) & (self._repeats > 0)
        if settings.convert is not None:
            self._raw[rows] = raw
            self._arrived[rows] = True
        counts.outscored_positives += int(outscoring.any(axis=1).sum())
        if self._waiting.late_pairs:
            self._count_late(rows, scores, own_scores)
            return relevant
        counts.scored_anchors += len(rows)
        counts.scored_negatives += len(rows) * (int(self._repeats.sum()) - 1)
        counts.positive_scores += float(own_scores.sum(dtype=np.float64))
        counts.negative_scores += float((scores @ self._repeats.astype(np.float32)).sum(dtype=np.float64))
        counts.negative_scores -= float(own_scores.sum(dtype=np.float64))
        return relevant

    def _in_units(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return scores in the margin's units, as they have arrived without distillation."""
        if self._settings.convert is None:
            return raw
        if not self._waiting.late_pairs:
            check_finite(raw)  # an infinite logit has a finite probability
        return self._settings.convert(raw)

    def _above(self, scores: NDArray[np.float32], limits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return where a score is above its row's threshold; false for a score, or a threshold, that is late."""
        return scores > limits[:, None] if self._waiting.late_pairs else above(scores, limits)

    def _count_late(self, rows: NDArray[np.intp], scores: NDArray[np.float32], own: NDArray[np.float32]) -> None:
        """Count rows some of whose scores are late. Without its positive's score a row has no threshold."""
        known, filtered = ~np.isnan(scores), ~np.isnan(own)
        known[~filtered] = False
        if self._known is None:
            self._known = np.full_like(self._relevant, 0xFF)
        self._known[rows] = np.packbits(known, axis=1)
        counts = self._counts
        counts.scored_anchors += int(filtered.sum())
        counts.scored_negatives += int((known @ self._repeats).sum()) - int(filtered.sum())
        positives = float(own[filtered].sum(dtype=np.float64))
        counts.positive_scores += positives
        counts.negative_scores += float((np.where(known, scores, 0) @ self._repeats).sum(dtype=np.float64)) - positives

    def _related_rows(self) -> NDArray[np.bool_]:
        """Return which rows of all ranks are related, shape ``(rows of all ranks, rows of all ranks)``.

        Whether rows i and j are related depends on the scores of both. So with a contrast term and
        ``contrast_filter="known"`` the loss waits for the scores of all rows before it uses the first.
        """
        if self._related is None:
            local, positives = len(self._decided), self._document_ids[0]
            parts = []
            for begin in range(0, local, _BLOCK_ROWS):
                end = min(begin + _BLOCK_ROWS, local)
                self._decide(begin, end)
                parts.append(_unpacked(self._relevant[begin:end], self._grid.documents)[:, positives])
            self._related = related(gather_flags(np.concatenate(parts), self.rows), self._anchor_ids)
        return self._related


def _unpacked(bits: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """Unpack bits into flags of shape ``(rows, count)``."""
    return np.unpackbits(bits, axis=1, count=count).view(np.bool_)


def _runs(positions: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Return ranges, begin to end (excluded), that together are the given sorted, distinct positions."""
    if not len(positions):
        return []
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def read_rows(job: ScoreRows, wanted: NDArray[np.intp], waiting: Waiting | None = None) -> NDArray[np.float32]:
    """Wait for some rows of a job, in any order and possibly repeated; shape ``(len(wanted), documents)``.

    Args:
        job: The job.
        wanted: The rows.
        waiting: Limits the time; scores that are late are NaN. Default: no limit.
    """
    limit = Waiting(None) if waiting is None else waiting
    distinct, positions = np.unique(wanted, return_inverse=True)
    return np.concatenate([limit.rows(job, begin, end) for begin, end in _runs(distinct)])[positions]
