"""Scoring jobs as the filter uses them: protocols of the client, of its methods, and of a job's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from loss_client.client.scores import RawScale, ScoreType, ScoreUsage


class ScoreRows(Protocol):
    """Scores of one job, whose rows become readable as they arrive; ``ScoreMatrix`` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""

    @property
    def wait_seconds(self) -> float:
        """Seconds that readers have waited for rows so far."""

    @property
    def usage(self) -> ScoreUsage:
        """Counts of the scores that have arrived."""

    @property
    def error(self) -> BaseException | None:
        """The error that ended the job; ``None`` while it runs and once it is complete."""

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for rows ``begin`` to ``end`` (excluded) and return them, shape ``(end - begin, columns)``."""

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        """Wait at most ``timeout`` seconds for rows, and return them with NaN for scores that have not arrived."""

    @property
    def span(self) -> tuple[float, float]:
        """Times at which the job began and ended, on the clock of ``time.monotonic``; now for a job that runs."""

    def release(self, begin: int, end: int) -> None:
        """Free the memory of rows that will not be read again."""

    def cancel(self) -> None:
        """Stop the job. No effect on a job that has ended."""


@runtime_checkable
class ScoringClient(Protocol):
    """A client that scores grids and lists of pairs; ``RerankerClient`` is one."""

    def stream_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        instruction: str | None,
        max_length: int | None,
        score_type: ScoreType,
        chunk_pairs: int | None,
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
        chunk_pairs: int | None,
        timeout: float | None,
        recurring: bool,
        bands: NDArray[np.int64] | None = None,
    ) -> ScoreRows:
        """Begin to score pairs, given by the positions of their texts, a row of one column each; returns at once.

        Args:
            queries: The queries.
            documents: The documents.
            query_ids: For each pair the position of its query.
            document_ids: For each pair the position of its document.
            instruction: See ``RerankerClient``, also for the other options.
            max_length: As above.
            score_type: As above.
            chunk_pairs: As above.
            timeout: As above.
            recurring: Whether the pairs will come again in later epochs.
            bands: For each pair the number of its band; pairs of a lower band are scored first. Default: one band.
        """

    def raw_scale(self, timeout: float | None) -> RawScale:
        """Return whether raw scores are logits or cosines; asks the server, at most ``timeout`` seconds."""


@runtime_checkable
class OneModelClient(ScoringClient, Protocol):
    """A client of several servers that can keep jobs to one model; ``RerankerClient`` is one."""

    def one_model(self) -> ScoringClient:
        """Return a view of the client whose jobs all get their scores from one model, or fail."""


class AskForGrid(Protocol):
    """``stream_grid`` of a client, with all options already given."""

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> ScoreRows:
        """Begin to score every query with every document; returns at once."""


class AskForPairs(Protocol):
    """``stream_pairs`` of a client, with all options but ``recurring`` already given."""

    def __call__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        *,
        recurring: bool,
        bands: NDArray[np.int64] | None = None,
    ) -> ScoreRows:
        """Begin to score pairs, given by the positions of their texts; returns at once. See ``ScoringClient``."""
