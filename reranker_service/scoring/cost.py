"""What one reply cost: the counts and times of the contract's ``Usage``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from reranker.v1 import reranker_pb2 as pb

from ..scheduling.scheduler import Job


@dataclass(slots=True)
class Cost:
    """Adds up while a reply is made.

    Attributes:
        arrived: When work on the reply began, ``time.monotonic()`` seconds.
        cached: Pairs whose score was known before.
        shared: Pairs that took the score of an identical pair.
        truncated: Pairs with a text cut to fit, among those scored for this reply.
    """

    arrived: float = field(default_factory=time.monotonic)
    cached: int = 0
    shared: int = 0
    truncated: int = 0
    _started: float | None = None
    _tokens: int = 0

    def add(self, job: Job) -> None:
        """Count a job that has run."""
        self._tokens += job.tokens
        self._started = job.started if self._started is None else min(self._started, job.started)

    def usage(self, pairs: int) -> pb.Usage:
        """Sum up, for a reply of ``pairs`` scores that is done now."""
        now = time.monotonic()
        started = now if self._started is None else self._started
        return pb.Usage(
            pairs=pairs,
            cached_pairs=self.cached,
            shared_pairs=self.shared,
            truncated_pairs=self.truncated,
            tokens=self._tokens,
            queue_seconds=max(0.0, started - self.arrived),
            engine_seconds=now - started,
        )
