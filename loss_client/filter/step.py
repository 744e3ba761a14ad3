"""What every way of filtering a batch has in common: whose texts are where, what was asked, what came of it.

A step is begun before the model embeds anything, often a whole batch ahead, and travels through the gradient cache as
its ``labels``, so that no part of it lives on the loss: several forward passes may be under way at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import IncompatibleServerError, RerankerError
from loss_client.client.scores import ScoreType, ScoreUsage
from loss_client.filter.gather import Rows, gather_columns
from loss_client.filter.masking import MarginStrategy
from loss_client.filter.texts import intern

ContrastFilter = Literal["known", "scores"]
"""What decides which pairs of anchors, and of positives, are no negatives; see ``RerankerCachedGISTEmbedLoss``."""

OnError = Literal["raise", "unfiltered"]
"""What becomes of a step whose scores cannot be had; see ``RerankerCachedGISTEmbedLoss``."""


class ScoreRows(Protocol):
    """Scores whose rows become readable as they arrive."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""

    @property
    def seconds_waited(self) -> float:
        """Seconds that readers have waited for rows so far."""

    @property
    def usage(self) -> ScoreUsage:
        """What the scores have cost so far."""

    @property
    def error(self) -> BaseException | None:
        """Why scores that are missing will not arrive; ``None`` while they may, or if none is missing."""

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for rows ``begin`` to ``end`` and return them, shape ``(end - begin, columns)``."""

    def release(self, begin: int, end: int) -> None:
        """Give back rows that nobody will read again."""

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

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        *,
        instruction: str | None,
        max_length: int | None,
        score_type: ScoreType,
        chunk_pairs: int,
        timeout: float | None,
        recurring: bool,
    ) -> ScoreRows:
        """Begin to score some pairs, given by positions, each a row of one column; returns at once."""


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """How scores become masks; see ``RerankerCachedGISTEmbedLoss`` for the meaning of each."""

    margin_strategy: MarginStrategy
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    contrast_filter: ContrastFilter
    gather: bool = False
    on_error: OnError = "raise"


@dataclass(slots=True)
class LossStatistics:
    """What the filter did, summed over the loss's forward passes (evaluation included) since the last ``reset``.

    Attributes:
        steps: Forward passes.
        unfiltered_steps: Of these, those whose scores could not be had, with ``on_error="unfiltered"``.
        anchors: Anchors.
        scored_anchors: Of these, those whose scores came.
        outscored_positives: Of these, those with a document of another text that scored above their own positive.
        negatives: Documents that stood as negatives of an anchor before the filter: for each anchor all documents of
            the batch but its own positive. Pairs of two anchors or two positives are not counted.
        masked_negatives: Of these, how many the filter dropped.
        scored_negatives: Of these, how many had a score.
        pairs: Pairs of distinct texts whose score was asked for.
        cached_pairs: Of these, how many the server had in its cache.
        remembered_pairs: Of these, how many the client had from before.
        skipped_pairs: Pairs of distinct texts that were left out, with ``candidates="mass"``.
        rounds: How often scores were asked for.
        reconnects: Streams that were lost and begun again.
        seconds_waited: Seconds that the loss waited for scores.
        positive_scores: Sum of the scores of the scored anchors' positives.
        negative_scores: Sum of the scores of the negatives that had one.
        unscored_share: Sum over the scored anchors of the share of the softmax denominator, after masking, that had no
            score.
        capped_anchors: Anchors whose share is above ``epsilon``, because of ``max_candidates``.
    """

    steps: int = 0
    unfiltered_steps: int = 0
    anchors: int = 0
    scored_anchors: int = 0
    outscored_positives: int = 0
    negatives: int = 0
    masked_negatives: int = 0
    scored_negatives: int = 0
    pairs: int = 0
    cached_pairs: int = 0
    remembered_pairs: int = 0
    skipped_pairs: int = 0
    rounds: int = 0
    reconnects: int = 0
    seconds_waited: float = 0.0
    positive_scores: float = 0.0
    negative_scores: float = 0.0
    unscored_share: float = 0.0
    capped_anchors: int = 0

    def add(self, other: LossStatistics) -> None:
        """Add the counts of ``other`` to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def since(self, earlier: LossStatistics) -> LossStatistics:
        """What came on top of ``earlier``."""
        return LossStatistics(
            **{field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)}
        )

    def reset(self) -> None:
        """Set every count to zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)


class FilterStep(ABC):
    """One batch: the scores that were asked for, and the masks that follow from them.

    It is begun with this rank's own texts, which needs no other rank, and settled when the loss begins to work on the
    batch; only then may masks be asked for.

    Args:
        columns: This rank's texts by column, anchors first, then positives, then any number of negatives; all of one
            length.

    Attributes:
        rows: Whose rows are where among the rows of all ranks; once settled.
        source: What it was begun with, by which its owner knows whether it is still of use.
        error: Why there are no scores, with ``on_error="unfiltered"``.
    """

    rows: Rows

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        self.error: RerankerError | None = None
        self.source: Hashable = None
        self._columns = columns
        self._counts = LossStatistics(steps=1, anchors=len(columns[0]))
        self._jobs: list[ScoreRows] = []

    def settle(self, settings: FilterSettings) -> None:
        """Learn what the loss wants now, and the texts of the other ranks; begin to score what that adds.

        Raises:
            ValueError: The ranks have different numbers of columns.
        """
        self._settings = settings
        merged: Sequence[Sequence[str]] = self._columns
        self.rows = Rows((len(self._columns[0]),), 0)
        if settings.gather:
            merged, self.rows = gather_columns(self._columns)
        self._anchor_ids = intern([merged[0]]).ids[0]  # (rows of all ranks,)
        self._lay_out(merged)

    @abstractmethod
    def _lay_out(self, merged: Sequence[Sequence[str]]) -> None:
        """Take in the texts of all ranks, by column."""

    @abstractmethod
    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """Ask for the scores that matter, given what the model finds similar; may wait.

        Args:
            size: How many rows to compute the logits of at a time.
            logits: Gives the logits of the local rows from begin to end, shape ``(end - begin, candidates)``.
        """

    @abstractmethod
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
            RerankerError: The scores could not be had, or one is NaN or infinite; with ``on_error="raise"``.
        """

    @abstractmethod
    def observe(self, begin: int, end: int, logits: Tensor) -> None:
        """Take note of the logits that the loss of some rows was made of, shape ``(end - begin, candidates)``."""

    def statistics(self) -> LossStatistics:
        """What this step did so far."""
        counts, usages = self._counts, [job.usage for job in self._jobs]
        counts.unfiltered_steps = int(self.error is not None)
        counts.rounds = len(self._jobs)
        counts.cached_pairs = sum(usage.cached_pairs for usage in usages)
        counts.remembered_pairs = sum(usage.remembered_pairs for usage in usages)
        counts.reconnects = sum(usage.reconnects for usage in usages)
        counts.pairs = sum(job.shape[0] * job.shape[1] for job in self._jobs)
        counts.seconds_waited = sum(job.seconds_waited for job in self._jobs)
        return counts

    def failed(self) -> bool:
        """Whether something that was asked for will not arrive."""
        return any(job.error is not None for job in self._jobs)

    def cancel(self) -> None:
        """Give up the scores that have not arrived."""
        for job in self._jobs:
            job.cancel()

    def _failed(self, error: RerankerError) -> None:
        """Go on without scores, or raise."""
        # No later step would fare better with a server that speaks another contract.
        if self._settings.on_error == "raise" or isinstance(error, IncompatibleServerError):
            raise error
        self.error = error
        self.cancel()
