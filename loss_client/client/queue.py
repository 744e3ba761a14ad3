"""JobQueue: begins the jobs of one client in the order of the training steps that need them.

A loss begins the jobs of many batches at once: with gradient accumulation those of a whole step, with loader workers
those of all batches that are ready. A server shares its engine fairly between streams. Without an order all these jobs
would be complete at about the same time, and the batch that is needed first would arrive with the last.

Therefore a job waits here, without a stream, while a job of an earlier step has more than a quarter of its scores still
to come. Two steps overlap in this way at the end of the first one, so that the server has work while a stream ends and
the next one opens. The overlap delays the first of the two by a quarter at most, and no other step beyond that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

_TAIL_SHARE = 4  # a job's last part, in which the next step begins: one in so many scores
_MOST_STEPS = 2


class Place:
    """A job's place in the queue.

    Args:
        step: Number of the step. Jobs of lower steps begin first; jobs of one step run together.
        pairs: Number of pairs of the job.
        chunk_pairs: Pairs of a chunk. The job's last part, in which the next step begins, is at least one chunk.

    Attributes:
        wanted: Whether a reader waits for the job.
        ending: Whether the job is in its last part.
        began: Set when the job may begin.
    """

    def __init__(self, step: int, pairs: int, chunk_pairs: int) -> None:
        self.step = step
        self.wanted = False
        self.began = asyncio.Event()
        self._tail = max(pairs // _TAIL_SHARE, chunk_pairs)
        self.ending = pairs <= self._tail
        self._loop: asyncio.AbstractEventLoop | None = None
        self._update: Callable[[], None] | None = None

    def enter(self, update: Callable[[], None]) -> None:
        """Enter a queue on the running event loop, which calls ``update`` after each change."""
        self._update = update
        self._loop = asyncio.get_running_loop()

    def want(self) -> None:
        """Have the job begin at once, because a reader waits for it; may be called from any thread."""
        if not self.wanted:
            self.wanted = True
            self._notify()

    def arrived(self, missing: int) -> None:
        """Note that ``missing`` scores have not arrived; may be called from any thread."""
        if not self.ending and missing <= self._tail:
            self.ending = True
            self._notify()

    def _notify(self) -> None:
        # A job that has not entered yet is looked at when it does.
        if self._loop is not None and self._update is not None:
            with suppress(RuntimeError):  # the client was closed, and its loop has ended
                self._loop.call_soon_threadsafe(self._update)


class JobQueue:
    """The places of one client's jobs; runs on the client's event loop.

    A job may begin if a reader waits for it, or if of the earlier steps at most one is running and that one is in its
    last part. Jobs without a place begin at once.
    """

    def __init__(self) -> None:
        self._waiting: list[Place] = []
        self._running: list[Place] = []

    async def begin(self, place: Place | None) -> None:
        """Wait until a job may begin. Must be followed by ``end``, also after an error and after cancellation."""
        if place is None:
            return
        place.enter(self._update)
        self._waiting.append(place)
        self._update()
        await place.began.wait()

    def end(self, place: Place | None) -> None:
        """Remove a job that has ended, or that will not begin any more."""
        for places in (self._waiting, self._running):
            if place in places:
                places.remove(place)
        self._update()

    def _update(self) -> None:
        """Let the jobs begin that may."""
        for place in sorted(self._waiting, key=lambda one: one.step):
            if place.wanted or self._is_next(place):
                self._waiting.remove(place)
                self._running.append(place)
                place.began.set()

    def _is_next(self, place: Place) -> bool:
        earlier = [one for one in self._running if one.step < place.step]
        return all(one.ending for one in earlier) and len({one.step for one in earlier}) < _MOST_STEPS
