"""A batch of which every pair is scored: the job begins with the texts, and rows are given back once they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import RerankerError
from loss_client.filter.gather import gather_flags
from loss_client.filter.interning import intern
from loss_client.filter.jobs import AskForGrid, ScoreRows
from loss_client.filter.masking import above, related, same_id, thresholds
from loss_client.filter.step import FilterStep

_BLOCK_ROWS = 256


class _Grid:
    """Scores of queries, one a local row, with documents that may come in several parts; equal texts are one.

    Attributes:
        jobs: One for each part.
    """

    def __init__(self, queries: Sequence[str], ask: AskForGrid) -> None:
        interned = intern([queries])
        self.jobs: list[ScoreRows] = []
        self._ask = ask
        self._queries = interned.texts
        self._query_of = interned.ids[0]  # (local rows,)
        self._readers = np.bincount(self._query_of)  # rows that still need each query's scores
        self._positions: dict[str, int] = {}

    @property
    def documents(self) -> int:
        """How many distinct documents there are."""
        return len(self._positions)

    def ids(self, columns: Iterable[Sequence[str]]) -> list[NDArray[np.intp]]:
        """Return the documents' ids by column; what is new is asked for."""
        before = len(self._positions)
        found = [
            np.array([self._positions.setdefault(text, len(self._positions)) for text in column], dtype=np.intp)
            for column in columns
        ]
        new = list(self._positions)[before:]
        if new:
            self.jobs.append(self._ask(self._queries, new))
        return found

    def read(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Wait for the scores of some local rows, shape ``(rows, documents)``."""
        return np.concatenate([read_rows(job, self._query_of[rows]) for job in self.jobs], axis=1)

    def release(self, rows: NDArray[np.intp]) -> None:
        """Give back the scores of local rows, each once, where no other row needs them."""
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
        contrast: Which contrast terms are filtered by scores of their own: between anchors, between positives.
        ask: Begins a scoring job. Called at once, with each distinct text once.
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
        """Have the rest of what these columns need scored; return the ids by column, anchors last if they have some."""
        # Anchors are scored as documents of anchors in the same grid: one job, and its rows come in order.
        documents = [*columns[1:], columns[0]] if self._contrast[0] else columns[1:]
        try:
            ids = self._grid.ids(documents)
            if self._positive_grid is not None:
                self._positive_columns = self._positive_grid.ids([columns[1]])[0]
        finally:
            self._jobs = [*self._grid.jobs, *(self._positive_grid.jobs if self._positive_grid else [])]
        return ids

    def _lay_out(self, merged: Sequence[Sequence[str]]) -> None:
        ids = self._ask(merged)
        self._document_ids = ids[: len(merged) - 1]  # one (rows of all ranks,) a column
        self._anchor_columns = ids[-1]
        local, documents = len(self._columns[0]), self._grid.documents
        self._repeats = np.bincount(np.concatenate(self._document_ids), minlength=documents)
        # One bit a score: what remains of the scores once they have been used.
        self._decided = np.zeros(local, dtype=np.bool_)
        self._relevant = np.zeros((local, -(-documents // 8)), dtype=np.uint8)
        if self._positive_grid is not None:
            self._relevant_positives = np.zeros((local, -(-self._positive_grid.documents // 8)), dtype=np.uint8)
        self._related: NDArray[np.bool_] | None = None

    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """Nothing is left to ask for."""

    def observe(self, begin: int, end: int, logits: Tensor) -> None:
        """Nothing is to be learned from logits."""

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

    def _decide(self, begin: int, end: int) -> None:
        """Turn the scores of rows into bits, once, and give the scores back."""
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
        # A document with the positive's text is the same document here: masked whatever the margin.
        relevant[lines, positives] = True
        self._relevant[rows] = np.packbits(relevant, axis=1)
        self._decided[rows] = True
        self._counts.negatives += len(rows) * (int(self._repeats.sum()) - 1)
        self._counts.masked_negatives += int((relevant @ self._repeats).sum()) - len(rows)

    def _compare(self, rows: NDArray[np.intp], positives: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which documents score above each row's threshold; ``positives`` holds the rows' own."""
        settings, counts, lines = self._settings, self._counts, np.arange(len(rows))
        scores = self._grid.read(rows)  # (rows, distinct documents)
        own_scores = scores[lines, positives]
        limits = thresholds(own_scores, settings.margin, settings.margin_strategy)
        relevant = above(scores, limits)
        if self._positive_grid is not None:
            found = above(self._positive_grid.read(rows), limits)
            self._relevant_positives[rows] = np.packbits(found, axis=1)
            self._positive_grid.release(rows)
        self._grid.release(rows)
        counts.outscored_positives += int(((scores > own_scores[:, None]) & (self._repeats > 0)).any(axis=1).sum())
        counts.scored_anchors += len(rows)
        counts.scored_negatives += len(rows) * (int(self._repeats.sum()) - 1)
        counts.positive_scores += float(own_scores.sum(dtype=np.float64))
        counts.negative_scores += float((scores @ self._repeats.astype(np.float32)).sum(dtype=np.float64))
        counts.negative_scores -= float(own_scores.sum(dtype=np.float64))
        return relevant

    def _related_rows(self) -> NDArray[np.bool_]:
        """Which rows of all ranks are about the same thing, shape ``(rows of all ranks, rows of all ranks)``.

        Whether rows i and j are related depends on the scores of both, so this needs the whole anchor-positive block:
        with contrast terms that are filtered by what is known, the loss waits for all rows before it uses the first.
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
    """Flags of shape ``(rows, count)`` from packed ones."""
    return np.unpackbits(bits, axis=1, count=count).view(np.bool_)


def _runs(positions: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Ranges, begin to end (excluded), that cover sorted, distinct positions."""
    if not len(positions):
        return []
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def read_rows(job: ScoreRows, wanted: NDArray[np.intp]) -> NDArray[np.float32]:
    """Rows of a job in any order, repetitions allowed, waiting for no others; shape ``(wanted, documents)``."""
    distinct, positions = np.unique(wanted, return_inverse=True)
    return np.concatenate([job.rows(begin, end) for begin, end in _runs(distinct)])[positions]
