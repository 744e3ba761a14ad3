"""Entry: the scheduler's book-keeping of one job, from its arrival to its last result."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from numpy.typing import NDArray

from ..engines import WrongResultError
from .job import Job, JobResult

Part = tuple["Entry", NDArray[np.intp]]
"""An entry and the positions of some of its job's sequences."""


class Entry:
    """A job under way. Its sequences are drawn from the queue, enter the engine, and are done, in this order.

    Attributes:
        job: The job.
        order: Positions of the job's sequences in the order in which they are drawn, shape ``(n,)``.
        drawn: Number of sequences that have left the queue.
        entered: Number of sequences that have entered the engine.
        arrived: Time of arrival, ``time.monotonic()`` seconds.
        started: Time at which the first sequence entered the engine; 0 before.
        end: Done when the last result is there; carries the error or the cancellation that ended the job.
    """

    def __init__(self, job: Job, longest_first: bool) -> None:
        self.job = job
        self.order = np.argsort(-job.lengths, kind="stable") if longest_first else np.arange(len(job))
        self.drawn = 0
        self.entered = 0
        self.arrived = time.monotonic()
        self.started = 0.0
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._done = 0
        self._values: NDArray[np.float32] | None = None

    @property
    def waiting(self) -> int:
        """Number of sequences that have not entered the engine."""
        return len(self.job) - self.entered

    def tokens(self, positions: NDArray[np.intp]) -> int:
        """Tokens of the sequences at some positions."""
        return int(self.job.lengths[positions].sum())

    def next_batch(self, sequences: int, tokens: int | None) -> tuple[int, int]:
        """Size of the next batch, in sequences and tokens.

        Args:
            sequences: Most sequences of a batch.
            tokens: Most tokens of a batch; a longer sequence is a batch of its own. ``None`` for no limit.
        """
        lengths = self.job.lengths[self.order[self.drawn : self.drawn + sequences]]
        sums = np.cumsum(lengths)
        count = len(lengths) if tokens is None else max(int(np.searchsorted(sums, tokens, side="right")), 1)
        return count, int(sums[count - 1])

    def draw(self, most: int) -> tuple[NDArray[np.intp], int]:
        """Take the next sequences out of the queue; gives their positions and their tokens."""
        positions = self.order[self.drawn : self.drawn + most]
        self.drawn += len(positions)
        return positions, self.tokens(positions)

    def put(self, positions: NDArray[np.intp], values: NDArray[np.float32]) -> None:
        """Take in results, shape ``(len(positions), ...)``; the last ones end the job.

        Raises:
            WrongResultError: Earlier results of the job had rows of another shape.
        """
        if self._values is None:
            self._values = np.empty((len(self.job), *values.shape[1:]), dtype=values.dtype)
        elif self._values.shape[1:] != values.shape[1:]:
            raise WrongResultError(
                f"the engine gave rows of shape {values.shape[1:]} after rows of shape {self._values.shape[1:]}"
            )
        self._values[positions] = values
        self._done += len(positions)
        if self._done == len(self.job) and not self.end.done():
            self.end.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the job with an error; a ``CancelledError`` cancels it."""
        if self.end.done():
            return
        if isinstance(error, asyncio.CancelledError):
            self.end.cancel()
        else:
            self.end.set_exception(error)

    def result(self) -> JobResult:
        """Results of a job that has ended well."""
        assert self._values is not None, "result() of a job without results"
        return JobResult(self._values, self.started, int(self.job.lengths.sum()))
