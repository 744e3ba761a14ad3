"""What one forward pass of the loss knows of the reranker: the scores on their way, and the masks made from them.

A step is begun before the model embeds anything and travels through the gradient cache as its ``labels``, so that no
part of it lives on the loss: several forward passes may be under way at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from loss_client.gather import Rows, gather_columns, gather_flags
from loss_client.masking import MarginStrategy, above, related, same_id, thresholds
from loss_client.scores import ScoreType, ScoreUsage
from loss_client.texts import intern

ContrastFilter = Literal["known", "scores"]
"""What decides which pairs of anchors, and of positives, are no negatives; see ``RerankerCachedGISTEmbedLoss``."""


class ScoreRows(Protocol):
    """The scores of a grid of queries and documents; its rows become readable as they arrive."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of documents."""

    @property
    def seconds_waited(self) -> float:
        """Seconds that readers have waited for rows so far."""

    @property
    def usage(self) -> ScoreUsage:
        """What the scores have cost so far."""

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for rows ``begin`` to ``end`` and return them, shape ``(end - begin, documents)``."""

    def cancel(self) -> None:
        """Give up what has not arrived; without effect on a job that is done."""


@runtime_checkable
class GridClient(Protocol):
    """What the loss needs of a client; ``RerankerClient`` is one."""

    def stream_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        instruction: str | None,
        max_length: int | None,
        score_type: ScoreType,
        chunk_pairs: int,
        timeout: float | None,
    ) -> ScoreRows:
        """Begin to score every query with every document; returns at once."""


class AskForScores(Protocol):
    """Begins to score every query with every document; returns at once."""

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> ScoreRows:
        """Begin one job."""


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """How scores become masks; see ``RerankerCachedGISTEmbedLoss`` for the meaning of each."""

    margin_strategy: MarginStrategy
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    contrast_filter: ContrastFilter


@dataclass(slots=True)
class LossStatistics:
    """What the filter did, summed over the loss's forward passes (evaluation included) since the last ``reset``.

    Attributes:
        steps: Forward passes.
        negatives: Documents that stood as negatives of an anchor before the filter: for each anchor all documents of
            the batch but its own positive. Pairs of two anchors or two positives are not counted.
        masked_negatives: Of these, how many the filter dropped.
        pairs: Pairs of distinct texts whose score the reranker was asked for.
        cached_pairs: Of these, how many the server had in its cache.
        seconds_waited: Seconds that the loss waited for scores.
    """

    steps: int = 0
    negatives: int = 0
    masked_negatives: int = 0
    pairs: int = 0
    cached_pairs: int = 0
    seconds_waited: float = 0.0

    def add(self, other: LossStatistics) -> None:
        """Add the counts of ``other`` to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def reset(self) -> None:
        """Set every count to zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)


class ScoringStep:
    """One batch: the scores that were asked for, and the masks that follow from them.

    Args:
        columns: This rank's texts by column, anchors first, then positives, then any number of negatives; all of one
            length.
        settings: How scores become masks.
        ask: Begins a scoring job. Called at once, with each distinct text once.
        gather: Whether the documents of all ranks are candidates.

    Attributes:
        rows: Whose rows are where among the rows of all ranks.
    """

    rows: Rows

    def __init__(
        self, columns: Sequence[Sequence[str]], settings: FilterSettings, ask: AskForScores, *, gather: bool
    ) -> None:
        self._settings = settings
        merged: Sequence[Sequence[str]] = columns
        self.rows = Rows((len(columns[0]),), 0)
        if gather:
            merged, self.rows = gather_columns(columns)
        anchors, documents = merged[0], merged[1:]
        score_contrast = settings.contrast_filter == "scores"
        # Anchors are scored as documents of anchors in the same grid: one job, and its rows come in order.
        scored_columns = [*documents, anchors] if score_contrast and settings.contrast_anchors else documents

        queries, scored = intern([columns[0]]), intern(scored_columns)
        self._query_rows = queries.ids[0]  # (local rows,)
        self._document_ids = scored.ids[: len(documents)]  # one (rows of all ranks,) a column
        self._anchor_columns = scored.ids[-1]
        self._anchor_ids = intern([anchors]).ids[0]
        self._related: NDArray[np.bool_] | None = None
        self._counts = LossStatistics(steps=1)
        self._rows_counted = 0
        self._jobs: list[ScoreRows] = []
        try:
            self._grid = self._begin(ask, queries.texts, scored.texts)
            self._positive_grid: ScoreRows | None = None
            if score_contrast and settings.contrast_positives:
                positives, all_positives = intern([columns[1]]), intern([documents[0]])
                self._positive_rows, self._positive_columns = positives.ids[0], all_positives.ids[0]
                self._positive_grid = self._begin(ask, positives.texts, all_positives.texts)
        except BaseException:
            self.cancel()
            raise

    def _begin(self, ask: AskForScores, queries: Sequence[str], documents: Sequence[str]) -> ScoreRows:
        job = ask(queries, documents)
        self._jobs.append(job)
        return job

    def mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Which candidates of some anchors are no negatives of theirs; waits for the scores that decide it.

        Args:
            begin: First local row.
            end: The local row after the last.

        Returns:
            Shape ``(end - begin, candidates)``. Candidates in the order of the loss's logits: all positives, all
            anchors (with ``contrast_anchors``), all positives again as seen from the anchor's positive (with
            ``contrast_positives``), then each column of negatives. An anchor's own positive is never masked.

        Raises:
            ScoreError: A score is NaN or infinite.
        """
        own = np.arange(begin, end) + self.rows.offset  # (end - begin,) columns of the anchors' own positives
        scores = read_rows(self._grid, self._query_rows[begin:end])  # (end - begin, distinct documents)
        relevant, limits = self._relevant(scores, own)
        blocks = [relevant[:, ids] for ids in self._document_ids]
        blocks[0][np.arange(end - begin), own] = False
        self._count(begin, end, blocks)

        contrast: list[NDArray[np.bool_]] = []
        if self._settings.contrast_filter == "known":
            repeats = self._settings.contrast_anchors + self._settings.contrast_positives
            contrast = [self._related_rows()[own]] * repeats if repeats else []
        else:
            if self._settings.contrast_anchors:
                mask = above(scores, limits)[:, self._anchor_columns]
                contrast.append(mask | same_id(self._anchor_ids[own], self._anchor_ids))
            if self._positive_grid is not None:
                scores = read_rows(self._positive_grid, self._positive_rows[begin:end])
                mask = above(scores, limits)[:, self._positive_columns]
                contrast.append(mask | same_id(self._positive_columns[own], self._positive_columns))
        return np.concatenate([blocks[0], *contrast, *blocks[1:]], axis=1)

    def _relevant(
        self, scores: NDArray[np.float32], own: NDArray[np.intp]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Which distinct documents are relevant to each anchor, its own positive included, and its threshold."""
        lines, positives = np.arange(len(own)), self._document_ids[0][own]
        limits = thresholds(scores[lines, positives], self._settings.margin, self._settings.margin_strategy)
        relevant = above(scores, limits)
        # A document with the positive's text is the same document here: masked whatever the margin.
        relevant[lines, positives] = True
        return relevant, limits

    def _related_rows(self) -> NDArray[np.bool_]:
        """Which rows of all ranks are about the same thing, shape ``(rows of all ranks, rows of all ranks)``.

        Whether rows i and j are related depends on the scores of both, so this needs the whole anchor-positive block:
        with contrast terms that are filtered by what is known, the loss waits for all rows before it uses the first.
        """
        if self._related is None:
            own = np.arange(len(self._query_rows)) + self.rows.offset
            relevant, _ = self._relevant(read_rows(self._grid, self._query_rows), own)
            everywhere = gather_flags(relevant[:, self._document_ids[0]], self.rows)
            self._related = related(everywhere, self._anchor_ids)
        return self._related

    def _count(self, begin: int, end: int, blocks: Sequence[NDArray[np.bool_]]) -> None:
        # MatryoshkaLoss asks for the same rows once for each of its dimensions.
        if begin < self._rows_counted:
            return
        self._rows_counted = end
        self._counts.negatives += sum(block.size for block in blocks) - (end - begin)
        self._counts.masked_negatives += sum(int(np.count_nonzero(block)) for block in blocks)

    def statistics(self) -> LossStatistics:
        """What this step did so far."""
        self._counts.pairs = sum(job.shape[0] * job.shape[1] for job in self._jobs)
        self._counts.cached_pairs = sum(job.usage.cached_pairs for job in self._jobs)
        self._counts.seconds_waited = sum(job.seconds_waited for job in self._jobs)
        return self._counts

    def cancel(self) -> None:
        """Give up the scores that have not arrived."""
        for job in self._jobs:
            job.cancel()


def read_rows(matrix: ScoreRows, wanted: NDArray[np.intp]) -> NDArray[np.float32]:
    """Rows of a score matrix in any order, waiting for no others.

    Args:
        matrix: The scores.
        wanted: Row numbers, any order, repetitions allowed; shape ``(rows,)``.

    Returns:
        Shape ``(rows, documents)``.
    """
    distinct, positions = np.unique(wanted, return_inverse=True)
    runs = np.split(distinct, np.flatnonzero(np.diff(distinct) > 1) + 1)
    parts = [matrix.rows(int(run[0]), int(run[-1]) + 1) for run in runs]
    return np.concatenate(parts)[positions]
