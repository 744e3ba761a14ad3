"""FilterStep: the scores and masks of one batch, whichever way its candidates are chosen.

A step begins before the model embeds its batch, often a whole batch ahead, and travels through the gradient cache as
``labels``. The loss keeps no reference to it, so that several forward passes may be in progress at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loss_client.client.errors import RerankerError, RerankerTimeoutError, is_permanent
from loss_client.filter.ahead import Batch
from loss_client.filter.equal_anchors import EqualAnchors
from loss_client.filter.gather import Rows, gather_columns
from loss_client.filter.interning import intern
from loss_client.filter.jobs import ScoreRows
from loss_client.filter.masking import MarginStrategy
from loss_client.filter.statistics import LossStatistics
from loss_client.filter.targets import Targets
from loss_client.filter.waiting import Waiting

ContrastFilter = Literal["known", "scores"]
"""Source of the filter for pairs of anchors and pairs of positives; see ``RerankerCachedGISTEmbedLoss``."""

OnError = Literal["raise", "unfiltered"]
"""Reaction to missing scores: fail, or train without the filter; see ``RerankerCachedGISTEmbedLoss``."""

_numbers = count()  # of this process's batches


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """Settings by which scores become masks and targets; see ``RerankerCachedGISTEmbedLoss`` for most of them.

    Attributes:
        convert: With distillation, turns the raw scores that arrive into scores in the margin's units; the raw ones are
            kept as targets. ``None`` without distillation.
        max_wait: Most seconds that a step waits for scores; ``None`` for no limit.
    """

    margin_strategy: MarginStrategy
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    contrast_filter: ContrastFilter
    gather: bool = False
    on_error: OnError = "raise"
    convert: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None
    max_wait: float | None = None

    @property
    def contrast_blocks(self) -> int:
        """Number of blocks of contrast terms among the candidates."""
        return self.contrast_anchors + self.contrast_positives


class _Distilled:
    """Sums over the rows of a step, each counted once: MatryoshkaLoss computes the loss of a row several times."""

    def __init__(self) -> None:
        self._rows = 0
        self._sums: list[Tensor] = []  # tensors, because reading each one would wait for the device

    def add(self, begin: int, end: int, sums: Tensor) -> None:
        """Add the sums of rows, unless these rows have been counted."""
        if begin >= self._rows:
            self._rows = end
            self._sums.append(sums)

    def values(self) -> list[float]:
        """Return the four sums."""
        if not self._sums:
            return [0.0] * 4
        return [float(value) for value in torch.stack(self._sums).sum(0).tolist()]


class FilterStep(ABC):
    """The scores of one batch, and the masks that follow from them.

    The constructor begins to score this rank's own texts, which needs no other rank. The loss calls ``settle`` when it
    begins to work on the batch, and only then ``select``, ``mask`` and ``observe``.

    Args:
        columns: This rank's texts by column, anchors first, then positives, then any number of negatives; all of one
            length.

    Attributes:
        rows: Position of this rank's rows among the rows of all ranks; set by ``settle``.
        source: Settings that the step was begun with; the loss uses the step only while they are its own.
        error: The error that ended the scoring, with ``on_error="unfiltered"``.
        temperature: The guide's temperature in this step, once the loss has set it.
        gathers: Whether the loss compares this rank's anchors with the documents of all ranks.
        announced: Whether the other ranks have been sent this rank's texts.
    """

    rows: Rows
    _document_ids: Sequence[NDArray[np.intp]]  # for each column (rows of all ranks,)

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        self.error: RerankerError | None = None
        self.source: Hashable = None
        self.temperature: float | None = None
        self.gathers = self.announced = False
        self._batch = Batch(next(_numbers), [list(column) for column in columns])
        self._cancelled = False
        self._columns = columns
        self._counts = LossStatistics(steps=1, anchors=len(columns[0]))
        self._jobs: list[ScoreRows] = []
        self._distilled = _Distilled()
        self._waiting = Waiting(None)

    def settle(self, settings: FilterSettings, following: FilterStep | None = None) -> None:
        """Take the loss's present settings and the other ranks' texts, and begin to score the pairs that they add.

        Args:
            settings: The loss's present settings.
            following: The step of this rank's next batch, if its scoring has begun. The ranks exchange the texts of
                their next batches too, and begin to score the pairs that these add.

        Raises:
            ValueError: The ranks have different numbers of columns.
        """
        self._settings = settings
        self._waiting = Waiting(settings.max_wait)
        merged: Sequence[Sequence[str]] = self._columns
        self.rows = Rows((len(self._columns[0]),), 0)
        ahead: Sequence[Sequence[str]] = []
        if settings.gather:
            merged, self.rows, ahead = gather_columns(self._batch, None if following is None else following._batch)
        self._anchor_ids = intern([merged[0]]).ids[0]  # (rows of all ranks,)
        self._lay_out(merged)
        self._equal_anchors = EqualAnchors(self._anchor_ids, self._document_ids[0])
        if following is not None and ahead:
            following._foresee(ahead)

    def _foresee(self, merged: Sequence[Sequence[str]]) -> None:
        """Begin to score the pairs that the other ranks' texts add, before ``settle``.

        An error ends this step's scoring, and the loss begins it again when it comes to the batch.

        Args:
            merged: Texts by column of those ranks whose next batch is known, this rank among them.
        """
        self.announced = True
        try:
            self._begin_ahead(merged)
        except Exception:  # any error here is of a later batch, and must not end the present one
            self.cancel()
        if self._cancelled:  # perhaps by another thread, before the last job began
            self.cancel()

    def _begin_ahead(self, merged: Sequence[Sequence[str]]) -> None:
        """Begin to score the pairs that the other ranks' texts add; see ``_foresee``. Default: none."""
        return

    @abstractmethod
    def _lay_out(self, merged: Sequence[Sequence[str]]) -> None:
        """Take the texts of all ranks, by column, and set ``_document_ids``."""

    @abstractmethod
    def select(self, size: int, logits: Callable[[int, int], Tensor]) -> None:
        """Ask for the scores that the model's similarities make necessary; may wait for some of them.

        Args:
            size: Number of rows whose logits are computed at a time.
            logits: Returns the logits of the local rows from begin to end, shape ``(end - begin, candidates)``.
        """

    @abstractmethod
    def mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Wait for the scores of some anchors and return the mask of their candidates: True where one is dropped.

        Args:
            begin: First local row.
            end: The local row after the last.

        Returns:
            Shape ``(end - begin, candidates)``. Candidates are in the order of the loss's logits: all positives, all
            anchors (with ``contrast_anchors``), all positives again as negatives of the anchor's positive (with
            ``contrast_positives``), then each column of negatives. An anchor's own positive is never masked; the
            positives of rows with the same anchor always are.

        Raises:
            RerankerError: Scores did not arrive, or one is NaN or infinite; with ``on_error="raise"``.
        """

    @abstractmethod
    def targets(self, begin: int, end: int) -> Targets:
        """Wait for the scores of some anchors and return their raw scores; only with distillation."""

    def count_distilled(self, begin: int, end: int, sums: Tensor) -> None:
        """Add to the statistics of some rows (anchors, distillation loss, entropy, underflows), shape ``(4,)``."""
        self._distilled.add(begin, end, sums)

    @property
    def underflows(self) -> int:
        """Number of the guide's probabilities that were exactly 0."""
        return int(self._distilled.values()[3])

    @abstractmethod
    def observe(self, begin: int, end: int, logits: Tensor) -> None:
        """Add to the statistics of some rows, from their logits of shape ``(end - begin, candidates)``."""

    @property
    def jobs(self) -> Sequence[ScoreRows]:
        """The scoring jobs so far."""
        return self._jobs

    def statistics(self) -> LossStatistics:
        """Return the counts of this step, once the loss has worked on it."""
        counts, usages = self._counts, [job.usage for job in self._jobs]
        counts.late_pairs = self._waiting.late_pairs
        if counts.late_pairs and not counts.scored_anchors and self.error is None:
            self.error = RerankerTimeoutError(
                f"no anchor's own documents were scored within {self._waiting.most} s (max_wait)"
            )
        counts.unfiltered_steps = int(self.error is not None)
        counts.rounds = len(self._jobs)
        counts.cached_pairs = sum(usage.cached_pairs for usage in usages)
        counts.client_cached_pairs = sum(usage.client_cached_pairs for usage in usages)
        counts.reconnects = sum(usage.reconnects for usage in usages)
        counts.servers = max((usage.servers for usage in usages), default=0)
        counts.pairs = sum(job.shape[0] * job.shape[1] for job in self._jobs)
        distilled, counts.distillation_loss, counts.guide_entropy, _ = self._distilled.values()
        counts.distilled_anchors = int(distilled)
        counts.wait_seconds = sum(job.wait_seconds for job in self._jobs)
        return counts

    def failed(self) -> bool:
        """Whether a job failed or was cancelled."""
        return self._cancelled or any(job.error is not None for job in self._jobs)

    def cancel(self) -> None:
        """Cancel the jobs whose scores have not arrived."""
        self._cancelled = True
        for job in self._jobs:
            job.cancel()

    def _failed(self, error: RerankerError) -> None:
        """Raise the error, or continue without scores."""
        # A server with another contract, for example, would fail every later step as well.
        if self._settings.on_error == "raise" or is_permanent(error):
            raise error
        self.error = error
        self.cancel()
