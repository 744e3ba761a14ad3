"""Cancellation: ends the choice of a batch's pairs and the jobs that the choice has begun."""

from __future__ import annotations

import threading
from collections.abc import Callable

from loss_client.client.errors import JobCancelledError
from loss_client.filter.jobs import ScoreRows


class Cancellation:
    """Connects the thread that chooses pairs with those that may cancel the choice."""

    def __init__(self) -> None:
        # Reentrant: a finalizer, which cancels a step, may run on a thread that holds the lock.
        self._lock = threading.RLock()
        self._cancelled = False
        self._jobs: list[ScoreRows] = []

    def check(self) -> None:
        """Raise ``JobCancelledError`` once ``cancel`` was called."""
        if self._cancelled:
            raise JobCancelledError("the choice of pairs was cancelled before it was complete")

    def begin(self, ask: Callable[[], ScoreRows]) -> ScoreRows:
        """Begin a job that ``cancel`` ends; returns what ``ask`` returns.

        Raises:
            JobCancelledError: ``cancel`` was called before; ``ask`` is not called then.
        """
        with self._lock:
            self.check()
            job = ask()
            self._jobs.append(job)
            return job

    def cancel(self) -> None:
        """Cancel the jobs that have begun, and let no other one begin."""
        with self._lock:
            self._cancelled = True
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.cancel()
