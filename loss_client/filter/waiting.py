"""Waiting: the time that one step may still wait for scores, and the number of pairs that came too late."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loss_client.filter.jobs import ScoreRows


class Waiting:
    """Reads the scores of one step's jobs, and stops to wait when the step's time is over.

    Args:
        most: Most seconds to wait, summed over all reads; ``None`` for no limit.

    Attributes:
        late_pairs: Number of scores that were read before they had arrived, and that the step does without.
    """

    def __init__(self, most: float | None) -> None:
        self.most = most
        self.late_pairs = 0
        self._left = most

    @property
    def left(self) -> float | None:
        """Seconds that may still be waited; ``None`` for no limit."""
        return self._left

    def spend(self, seconds: float) -> None:
        """Subtract the seconds of a wait."""
        if self._left is not None:
            self._left = max(0.0, self._left - seconds)

    def rows(self, job: ScoreRows, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for rows ``begin`` to ``end`` (excluded) of a job, and cancel the job if they do not arrive in time.

        Returns:
            Shape ``(end - begin, columns)``. NaN where no score has arrived, which only happens with a limit.

        Raises:
            RerankerError: The job failed.
        """
        if self._left is None:
            return job.rows(begin, end)
        waited = job.wait_seconds
        found = job.arrived(begin, end, self._left)
        self.spend(job.wait_seconds - waited)
        late = int(np.isnan(found).sum())
        if late:
            self.late_pairs += late
            job.cancel()
        return found
