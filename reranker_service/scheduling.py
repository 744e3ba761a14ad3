"""Who comes next: admits the work of many clients into one engine.

The engine is given batches of sequences, never more in all than it wants at a time, so that what has not entered it can
still be overtaken or withdrawn. Interactive work goes first. Among streams of one priority the one that has been
given the fewest tokens so far goes next, so that a stream with many chunks waiting cannot starve another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from .engines.base import Engine, TokenSequence
from .metrics import Metrics

# For an engine that pads: one that runs and the next one. What comes meanwhile gathers for a full batch.
_PADDED_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Ticket:
    """Whose work it is.

    Attributes:
        stream: Identifies the call that the work belongs to; calls share the engine fairly.
        interactive: Whether the work overtakes work that is not.
    """

    stream: Hashable
    interactive: bool


@dataclass(eq=False, slots=True)
class Job:
    """Sequences to run, made only when the engine has room for them.

    Attributes:
        ticket: Whose work it is.
        lengths: Tokens of each sequence, int64, shape ``(n,)``.
        make: Gives the sequences at positions ``[begin, end)``; they may be made as they are read.
        started: When its first sequence entered the engine; 0 before.
        tokens: Tokens that have entered the engine so far.
    """

    ticket: Ticket
    lengths: NDArray[np.int64]
    make: Callable[[int, int], Sequence[TokenSequence]]
    started: float = 0.0
    tokens: int = 0
    _taken: int = 0
    _results: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _missing: int = 0
    _running: set[_Batch] = field(default_factory=set)
    _done: asyncio.Future[None] | None = None

    @property
    def left(self) -> int:
        """How many of its sequences have not entered the engine."""
        return len(self.lengths) - self._taken


@dataclass(eq=False, slots=True)
class _Batch:
    """What one call of the engine is given: parts of one job, or of several."""

    sequences: list[Sequence[TokenSequence]] = field(default_factory=list)
    parts: list[tuple[Job, int]] = field(default_factory=list)  # each with its first position
    wanted: set[Job] = field(default_factory=set)  # jobs that still wait for it
    task: asyncio.Task[NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.sequences))


class _Queue:
    """Jobs of one priority, fairly shared between streams by tokens."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, deque[Job]] = {}
        self._served: dict[Hashable, int] = {}

    def push(self, job: Job) -> None:
        stream = job.ticket.stream
        if stream not in self._jobs:
            # A newcomer starts level with the least served: it neither waits for nor overtakes all others.
            self._served[stream] = min(self._served.values(), default=0)
            self._jobs[stream] = deque()
        self._jobs[stream].append(job)

    def first(self) -> Job | None:
        if not self._jobs:
            return None
        return self._jobs[min(self._jobs, key=self._served.__getitem__)][0]

    def charge(self, job: Job, tokens: int) -> None:
        self._served[job.ticket.stream] += tokens

    def remove(self, job: Job) -> None:
        jobs = self._jobs.get(job.ticket.stream)
        if jobs is None or job not in jobs:
            return
        jobs.remove(job)
        if not jobs:
            del self._jobs[job.ticket.stream]
            del self._served[job.ticket.stream]


class Scheduler:
    """Feeds one engine from any number of jobs; lives on one event loop.

    Attributes:
        waiting: Sequences that have not entered the engine.
        running: Sequences inside the engine.
        waiting_since: When the oldest job that still waits came, ``time.monotonic()`` seconds; ``None`` if none waits.
    """

    def __init__(self, engine: Engine, metrics: Metrics | None = None) -> None:
        self.waiting = 0
        self.running = 0
        self.waiting_since: float | None = None
        self._engine = engine
        self._metrics = metrics or Metrics()
        self._interactive = _Queue()
        self._bulk = _Queue()
        self._arrivals: dict[Job, float] = {}
        self._batches = 0

    async def run(self, job: Job) -> NDArray[np.float32]:
        """Run a job to its end.

        Returns:
            What the engine gave, in the order of the job's positions; shape ``(n, ...)``.

        Raises:
            EngineDeadError: The engine is gone.

        Cancelling the call withdraws what has not run yet.
        """
        job._done = asyncio.get_running_loop().create_future()
        job._missing = len(job.lengths)
        self._queue(job).push(job)
        self._arrivals[job] = time.monotonic()
        self.waiting_since = self.waiting_since or self._arrivals[job]
        self.waiting += len(job.lengths)
        self._admit()
        try:
            await job._done
        finally:
            self._leave(job)
            for batch in job._running:
                batch.wanted.discard(job)
                if not batch.wanted and batch.task is not None:
                    batch.task.cancel()
        return np.concatenate([job._results[begin] for begin in sorted(job._results)])

    def _queue(self, job: Job) -> _Queue:
        return self._interactive if job.ticket.interactive else self._bulk

    def _admit(self) -> None:
        while (batch := self._next()) is not None:
            self.running += len(batch)
            self._batches += 1
            # Sequences of one job are made as the engine reads them.
            alone = len(batch.sequences) == 1
            sequences = batch.sequences[0] if alone else list(chain.from_iterable(batch.sequences))
            batch.task = asyncio.create_task(self._engine.run(sequences))
            # A callback, not code around the call: it comes also for a task that is cancelled before it begins.
            batch.task.add_done_callback(partial(self._finished, batch))

    def _next(self) -> _Batch | None:
        """Take the next batch out of the queue; ``None`` if nothing waits or the engine has no room."""
        engine = self._engine
        batch = _Batch()
        if engine.pads and self._batches >= _PADDED_BATCHES:
            return None
        queue = self._interactive if self._interactive.first() else self._bulk
        while (job := queue.first()) is not None and len(batch) < engine.max_batch:
            count = min(engine.max_batch - len(batch), job.left)
            # An idle engine takes anything; a busy one waits for room for the whole batch rather than get crumbs.
            if not batch.parts and self.running and self.running + count > engine.max_in_flight:
                return None
            self._take(queue, job, count, batch)
            if batch.parts and not engine.pads:
                # One that pads finds sequences of like length among many; for others a batch of one job is done sooner.
                break
        return batch if batch.parts else None

    def _take(self, queue: _Queue, job: Job, count: int, batch: _Batch) -> None:
        begin, end = job._taken, job._taken + count
        try:
            sequences = job.make(begin, end)
        except Exception as error:
            self._fail(job, error)
            return
        batch.sequences.append(sequences)
        batch.parts.append((job, begin))
        batch.wanted.add(job)
        job._running.add(batch)
        tokens = int(job.lengths[begin:end].sum())
        self._metrics.batch(count, tokens)
        job.started = job.started or time.monotonic()
        job.tokens += tokens
        job._taken = end
        queue.charge(job, tokens)
        self.waiting -= count
        if not job.left:
            self._leave(job)

    def _finished(self, batch: _Batch, task: asyncio.Task[NDArray[np.float32]]) -> None:
        self.running -= len(batch)
        self._batches -= 1
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        row = 0
        for (job, begin), sequences in zip(batch.parts, batch.sequences, strict=True):
            job._running.discard(batch)
            if error is not None:
                self._fail(job, error)
                continue
            job._results[begin] = task.result()[row : row + len(sequences)]
            row += len(sequences)
            job._missing -= len(sequences)
            if job._missing == 0 and job._done is not None and not job._done.done():
                job._done.set_result(None)
        self._admit()

    def _leave(self, job: Job) -> None:
        """Take a job out of the queue: all of it is in the engine, or the rest is not wanted any more."""
        if self._arrivals.pop(job, None) is None:
            return
        self._queue(job).remove(job)
        self.waiting -= job.left
        self.waiting_since = next(iter(self._arrivals.values()), None)

    def _fail(self, job: Job, error: BaseException) -> None:
        self._leave(job)
        if job._done is None or job._done.done():
            return
        if isinstance(error, asyncio.CancelledError):
            job._done.cancel()
        else:
            job._done.set_exception(error)
