"""Patience: how long a job waits for scores, and how long one of its attempts waits for a sign of life."""

from __future__ import annotations

import asyncio
from copy import copy
from dataclasses import dataclass

from reranker.v1 import reranker_pb2 as pb

_STALL_SHARE = 3
_SHORTEST_STALL_SECONDS = 0.3
_PROGRESS_SHARE = 4
_SHORTEST_PROGRESS_SECONDS, _LONGEST_PROGRESS_SECONDS = 0.1, 5.0
# Stall limits that an attempt may last at a server that sends progress but finishes no pair.
_IDLE_LIMITS = 2


@dataclass(slots=True)
class _Deadline:
    last_progress: float


class Patience:
    """Deadline of a call or job, and limits of each of its attempts.

    - The deadline: at most ``seconds`` may pass without finished work. Finished work is an answer, or a progress
      message with a higher number of finished pairs than the one before: the server then works, if for other calls.
    - The stall limit: an attempt ends once its server has sent nothing for ``stall_seconds``. Any message is a sign of
      life. Without a ``stall_seconds`` of the caller it ends an attempt only if another server can take over, or if the
      server sends progress messages; a silent server of contract 1.0 that is the only one may be busy.
    - An attempt also ends if another server can take over and this one sends progress, but has finished nothing for
      twice the stall limit.
    - While an attempt waits for nothing from its server (``idle``), only the deadline counts.

    Args:
        seconds: See above.
        stall_seconds: See above. Default: a third of ``seconds``, 0.3 or more.
    """

    def __init__(self, seconds: float, stall_seconds: float | None = None) -> None:
        self.seconds = seconds
        self.stall_seconds = (
            max(seconds / _STALL_SHARE, _SHORTEST_STALL_SECONDS) if stall_seconds is None else stall_seconds
        )
        self._deadline = _Deadline(self._now())
        self._always_stalls = stall_seconds is not None
        self.begin_attempt(takeover=False)

    def branch(self) -> Patience:
        """Return limits for attempts that run beside those of this object, up to the same deadline.

        Finished work of one attempt moves the deadline of all. The other limits are those of each attempt alone.
        """
        branch = copy(self)
        branch.begin_attempt(takeover=False)
        return branch

    @property
    def last_progress(self) -> float:
        """Loop time of the last finished work; of the beginning, if there was none."""
        return self._deadline.last_progress

    @property
    def finished(self) -> bool:
        """Whether the server of the present attempt has finished work."""
        return self._finished is not None

    @property
    def progress_seconds(self) -> float:
        """Seconds between progress messages that a stream asks for: several within the stall limit."""
        return min(max(self.stall_seconds / _PROGRESS_SHARE, _SHORTEST_PROGRESS_SECONDS), _LONGEST_PROGRESS_SECONDS)

    def begin_attempt(self, takeover: bool) -> None:
        """Begin an attempt.

        Args:
            takeover: Whether another server can take over if this attempt stalls.
        """
        self._waits_since = self._heard = self._now()
        self._finished: float | None = None  # loop time of the last finished work of this attempt
        self._takeover = takeover
        self._reports = self._idle = False
        self._work: pb.StreamProgress | None = None

    def expect_reports(self) -> None:
        """Note that the server of this attempt sends progress messages."""
        self._reports = True

    def idle(self, idle: bool) -> None:
        """Note whether the attempt waits for nothing from its server, for example because all chunks are taken."""
        if self._idle and not idle:
            self._heard = self._waits_since = self._now()
        self._idle = idle

    def progress(self) -> None:
        """Extend the deadline and the stall limit: an answer arrived."""
        self._deadline.last_progress = self._heard = self._finished = self._now()

    def heard(self, work: pb.StreamProgress | None = None) -> None:
        """Extend the stall limit after a sign of life, and the deadline too if the server has finished more pairs.

        Args:
            work: The server's progress message. Default: none, another message arrived.
        """
        self._heard = self._now()
        if work is None:
            return
        if self._work is not None and work.pairs_finished > self._work.pairs_finished:
            self._deadline.last_progress = self._finished = self._heard
        self._work = work

    def remaining(self) -> float:
        """Seconds until the deadline; 0 or less once it has passed."""
        return self.last_progress + self.seconds - self._now()

    def attempt_remaining(self) -> float:
        """Seconds until the present attempt ends; 0 or less once it has passed a limit."""
        ends = [self.remaining()]
        if self._idle:
            return ends[0]
        now = self._now()
        if self._always_stalls or self._takeover or self._reports:
            ends.append(self._heard + self.stall_seconds - now)
        if self._takeover and self._work is not None:
            ends.append(self._idle_since() + _IDLE_LIMITS * self.stall_seconds - now)
        return min(ends)

    def describe(self, seconds: float | None = None) -> str:
        """Describe why the present attempt ended, after the name of the server.

        Args:
            seconds: The time to name. Default: the time that has passed.
        """
        now = self._now()
        if self._work is None or now - self._heard >= self.stall_seconds:
            return f"sent nothing for {f'{now - self._heard:.3g}' if seconds is None else f'{seconds:g}'} s"
        ahead = max(self._work.pairs_in_server - self._work.pairs_waiting, 0)
        idle = now - self._idle_since()
        return (
            f"is alive and busy: {ahead} pairs ahead of {self._work.pairs_waiting} of this job, but none finished for "
            f"{f'{idle:.3g}' if seconds is None else f'{seconds:g}'} s"
        )

    def _idle_since(self) -> float:
        """Loop time since which the server of this attempt has finished nothing that the attempt waits for."""
        return self._waits_since if self._finished is None else max(self._waits_since, self._finished)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
