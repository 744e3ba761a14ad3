"""Scoring jobs as the filter sees them: the methods that it needs of a client, and of the scores of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from loss_client.client.scores import ScoreType, ScoreUsage


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
class ScoringClient(Protocol):
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


class AskForGrid(Protocol):
    """Begins to score every query with every document; returns at once."""

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> ScoreRows:
        """Begin one job."""


class AskForPairs(Protocol):
    """Begins to score pairs, given by positions of their query and document; returns at once."""

    def __call__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        *,
        recurring: bool,
    ) -> ScoreRows:
        """Begin one job, of pairs that will recur in later epochs or not."""
