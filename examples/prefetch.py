"""Effect of prefetch on the time of a training step, with a reranker of fixed speed.

The demo's server shares the cores with the training, so that its work cannot be hidden. Here the reranker is a client
in this process that computes nothing: its scores arrive after a given time, as from a GPU on another machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from examples.contenders import reranked
from examples.training import Recipe, train
from loss_client.client.scores import RawScale, ScoreUsage


class FixedTimeScores:
    """Implements ``ScoreRows``: every score is 0, and all rows arrive at one time.

    Args:
        shape: Rows and columns.
        arrival: Time of arrival, on the clock of ``time.monotonic``.
    """

    error = None

    def __init__(self, shape: tuple[int, int], arrival: float) -> None:
        self.span = (time.monotonic(), arrival)
        self.shape = shape
        self.wait_seconds = 0.0
        self.usage = ScoreUsage(pairs=shape[0] * shape[1])
        self._arrival = arrival

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for the time of arrival and return rows of zeros, shape ``(end - begin, columns)``."""
        missing = max(0.0, self._arrival - time.monotonic())
        time.sleep(missing)
        self.wait_seconds += missing
        return np.zeros((end - begin, self.shape[1]), dtype=np.float32)

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        """Wait at most ``timeout`` seconds; return rows of zeros, or of NaN before the time of arrival."""
        if time.monotonic() + timeout >= self._arrival:
            return self.rows(begin, end)
        time.sleep(timeout)
        self.wait_seconds += timeout
        return np.full((end - begin, self.shape[1]), np.nan, dtype=np.float32)

    def release(self, begin: int, end: int) -> None:
        """Do nothing: no scores are kept."""

    def cancel(self) -> None:
        """Do nothing: no work is done."""


class FixedTimeReranker:
    """Implements ``ScoringClient``: a reranker that takes the same time for each job, one job after the other.

    Args:
        seconds: Seconds that a job takes.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free = 0.0  # time at which the last job is finished

    def stream_grid(self, queries: Sequence[str], documents: Sequence[str], **options: Any) -> FixedTimeScores:
        """Begin a job for every query with every document."""
        return self._begin((len(queries), len(documents)))

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        **options: Any,
    ) -> FixedTimeScores:
        """Begin a job for listed pairs."""
        return self._begin((len(query_ids), 1))

    def raw_scale(self, timeout: float | None) -> RawScale:
        """Return that raw scores are cosines."""
        return "cosine"

    def _begin(self, shape: tuple[int, int]) -> FixedTimeScores:
        self._free = max(self._free, time.monotonic()) + self._seconds
        return FixedTimeScores(shape, self._free)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Median seconds of a training step.

    Attributes:
        scoring: Seconds that the reranker takes for a batch.
        alone: Step whose scores are there at once.
        prefetch: Step whose scores were requested one batch ahead.
        without: Step whose scores are requested when the step begins.
    """

    scoring: float
    alone: float
    prefetch: float
    without: float

    def __str__(self) -> str:
        return (
            f"Prefetch: a reranker on another machine that takes {self.scoring:.2f} s for a batch makes a step of "
            f"{self.alone:.2f} s last {self.prefetch:.2f} s with prefetch and {self.without:.2f} s without."
        )


def measure(
    make_student: Callable[[], SentenceTransformer], triplets: Dataset, recipe: Recipe, output: Path, share: float = 0.8
) -> StepTimes:
    """Train three times for a few steps, and compare the step times.

    Args:
        make_student: Makes the student.
        triplets: Columns ``anchor``, ``positive`` and ``negative``.
        recipe: Settings of the trainings; at least 3 steps, because no batch is scored ahead of the first step.
        output: Output directory of the trainer.
        share: Time that the reranker takes for a batch, over the time of a step without waiting.
    """

    def step_seconds(scoring: float, prefetch: bool) -> float:
        reranker = FixedTimeReranker(scoring)
        contender = reranked("fixed speed", reranker, temperature=0.05, mini_batch_size=32, reranker_max_length=None)
        return train(
            contender, make_student, triplets, recipe, output, lambda report: None, prefetch=prefetch
        ).step_seconds

    alone = step_seconds(0.0, prefetch=True)
    scoring = share * alone
    return StepTimes(scoring, alone, step_seconds(scoring, prefetch=True), step_seconds(scoring, prefetch=False))
