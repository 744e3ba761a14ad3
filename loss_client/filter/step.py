"""What every way of filtering a batch has in common: whose texts are where, what was asked, what came of it.

A step is begun before the model embeds anything, often a whole batch ahead, and travels through the gradient cache as
its ``labels``, so that no part of it lives on the loss: several forward passes may be under way at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import IncompatibleServerError, RerankerError
from loss_client.filter.gather import Rows, gather_columns
from loss_client.filter.interning import intern
from loss_client.filter.jobs import ScoreRows
from loss_client.filter.masking import MarginStrategy
from loss_client.filter.statistics import LossStatistics

ContrastFilter = Literal["known", "scores"]
"""What decides which pairs of anchors, and of positives, are no negatives; see ``RerankerCachedGISTEmbedLoss``."""

OnError = Literal["raise", "unfiltered"]
"""What becomes of a step whose scores cannot be had; see ``RerankerCachedGISTEmbedLoss``."""


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
