"""Mean guide: a scoring client that averages the raw scores of two servers, as one service of both models would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_client.client.scores import RawScale, ScoreUsage
from loss_client.filter.jobs import ScoreRows, ScoringClient


@dataclass(frozen=True, slots=True)
class Member:
    """One of the averaged models.

    Attributes:
        client: Client of its server.
        max_length: Maximum tokens of its input.
        factor: Factor of its raw scores before they are averaged.
        shift: Summand after that.
    """

    client: ScoringClient
    max_length: int
    factor: float = 1.0
    shift: float = 0.0


def onto(first: Sequence[NDArray[np.float32]], second: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """Return factor and shift that give the ``second`` scores the mean and the standard deviation of the ``first``."""
    ours, theirs = (np.concatenate([one.ravel() for one in scores]).astype(np.float64) for scores in (first, second))
    factor = float(ours.std() / theirs.std())
    return factor, float(ours.mean() - factor * theirs.mean())


class MeanScores:
    """Scores of one job of every member, averaged as their rows arrive; implements ``ScoreRows``.

    Args:
        jobs: The members' jobs over the same pairs.
        members: The members, in the same order.
    """

    def __init__(self, jobs: Sequence[ScoreRows], members: Sequence[Member]) -> None:
        self._jobs = jobs
        self._members = members

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self._jobs[0].shape

    @property
    def wait_seconds(self) -> float:
        """Seconds that readers have waited so far; they wait for one member after the other."""
        return sum(job.wait_seconds for job in self._jobs)

    @property
    def usage(self) -> ScoreUsage:
        """Counts of the last member's scores."""
        return self._jobs[-1].usage

    @property
    def error(self) -> BaseException | None:
        """The first member's error; ``None`` without any."""
        return next((job.error for job in self._jobs if job.error is not None), None)

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for rows ``begin`` to ``end`` (excluded) of all members; return their mean."""
        total = np.zeros((end - begin, self.shape[1]))
        for job, member in zip(self._jobs, self._members, strict=True):
            total += member.factor * job.rows(begin, end) + member.shift
        return (total / len(self._jobs)).astype(np.float32)

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        """Wait at most ``timeout`` seconds for each member's rows; return their mean, NaN where a score is missing."""
        total = np.zeros((end - begin, self.shape[1]))
        for job, member in zip(self._jobs, self._members, strict=True):
            total += member.factor * job.arrived(begin, end, timeout) + member.shift
        return (total / len(self._jobs)).astype(np.float32)

    @property
    def span(self) -> tuple[float, float]:
        """Times at which the first member's job began and the last one's ended; see ``ScoreRows``."""
        spans = [job.span for job in self._jobs]
        return min(begun for begun, _ in spans), max(ended for _, ended in spans)

    def release(self, begin: int, end: int) -> None:
        """Free the memory of rows that will not be read again."""
        for job in self._jobs:
            job.release(begin, end)

    def cancel(self) -> None:
        """Stop all jobs."""
        for job in self._jobs:
            job.cancel()


class MeanScorer:
    """Scores pairs by the mean of its members' mapped raw scores; implements ``ScoringClient``.

    Args:
        members: The members. The first one's raw scores are cosines, and the others are mapped onto them.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def raw_scale(self, timeout: float | None) -> RawScale:
        """Return ``"cosine"``, without a call."""
        return "cosine"

    def stream_grid(self, *texts: Any, **options: Any) -> ScoreRows:
        """Begin to score every query with every document; see ``ScoringClient``."""
        return self._begin(lambda client: client.stream_grid, texts, options)

    def stream_pairs(self, *texts_and_ids: Any, **options: Any) -> ScoreRows:
        """Begin to score pairs; see ``ScoringClient``."""
        return self._begin(lambda client: client.stream_pairs, texts_and_ids, options)

    def _begin(
        self, method: Callable[[ScoringClient], Callable[..., ScoreRows]], given: Sequence[Any], options: dict[str, Any]
    ) -> ScoreRows:
        if options.get("score_type") != "raw":
            raise ValueError(
                f"The mean guide averages raw scores: set score_type='raw', not {options['score_type']!r}."
            )
        jobs = [
            method(member.client)(*given, **{**options, "max_length": member.max_length}) for member in self._members
        ]
        return MeanScores(jobs, self._members)
