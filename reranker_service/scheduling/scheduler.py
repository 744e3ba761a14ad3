"""Who comes next: admits the work of many clients into one engine.

The engine is given batches of sequences, never more in all than it wants at a time, so that what has not entered it can
still be overtaken or withdrawn. Interactive work goes first, also inside an engine that lets it overtake. Among streams
of one priority the one that has been given the fewest tokens so far goes next, so that a stream with many chunks
waiting cannot starve another.

An engine that takes sequences one by one gets what stands together in one job. One that pads gets batches of like
length, out of a window over all that waits; it holds two of them, one that runs and the next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine, TokenSequence
from ..engines.checks import NonFiniteScoreError
from ..observing.metrics import Metrics
from .window import Pace, Part, Window

_PADDED_BATCHES = 2
# Of an engine that takes sequences one by one: one step that runs, and what keeps it busy until the next ones come.
_STEPS = 4
# How many sequences one stream puts into a window before it is another's turn.
_TURN = 32


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
        make: Gives the sequences at some positions, shape ``(k,)``; they may be made as they are read.
        started: When its first sequence entered the engine; 0 before.
        tokens: Tokens that have entered the engine so far.
    """

    ticket: Ticket
    lengths: NDArray[np.int64]
    make: Callable[[NDArray[np.intp]], Sequence[TokenSequence]]
    started: float = 0.0
    tokens: int = 0
    _order: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    _drawn: int = 0
    _entered: int = 0
    _done: int = 0
    _results: NDArray[np.float32] | None = None
    _running: set[_Batch] = field(default_factory=set)
    _end: asyncio.Future[None] | None = None

    @property
    def left(self) -> int:
        """How many of its sequences have not entered the engine."""
        return len(self.lengths) - self._entered

    def next_batch(self, sequences: int, tokens: int | None) -> tuple[int, int]:
        """How many of its next sequences make a batch, and how many tokens these have.

        Args:
            sequences: Most sequences.
            tokens: Most tokens, though a longer sequence goes alone; ``None`` for any number.
        """
        ends = np.cumsum(self.lengths[self._order[self._drawn : self._drawn + sequences]])
        count = len(ends)
        if tokens is not None:
            count = max(1, int(np.searchsorted(ends, tokens, side="right")))
        return count, int(ends[count - 1])


@dataclass(eq=False, slots=True)
class _Batch:
    """What one call of the engine is given: parts of one job, or of several."""

    parts: list[Part] = field(default_factory=list)
    sequences: list[Sequence[TokenSequence]] = field(default_factory=list)  # of each part
    tokens: int = 0
    interactive: bool = False
    entered: float = field(default_factory=time.monotonic)
    wanted: set[Job] = field(default_factory=set)  # jobs that still wait for it
    task: asyncio.Task[NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return sum(len(positions) for _, positions in self.parts)


@dataclass(slots=True)
class _Held:
    """What is inside the engine."""

    sequences: int = 0
    tokens: int = 0

    def add(self, batch: _Batch) -> None:
        self.sequences += len(batch)
        self.tokens += batch.tokens

    def remove(self, batch: _Batch) -> None:
        self.sequences -= len(batch)
        self.tokens -= batch.tokens


class _Queue:
    """Jobs of one priority, fairly shared between streams by tokens.

    Attributes:
        window: What was drawn for an engine that pads and has not entered it.
    """

    def __init__(self) -> None:
        self.window = Window()
        # A stream's jobs in the order of their coming: any of them may be withdrawn, and there may be many.
        self._jobs: dict[Hashable, dict[Job, None]] = {}
        self._served: dict[Hashable, int] = {}

    def push(self, job: Job) -> None:
        stream = job.ticket.stream
        if stream not in self._jobs:
            # A newcomer starts level with the least served: it neither waits for nor overtakes all others.
            self._served[stream] = min(self._served.values(), default=0)
            self._jobs[stream] = {}
        self._jobs[stream][job] = None

    def first(self) -> Job | None:
        if not self._jobs:
            return None
        return next(iter(self._jobs[min(self._jobs, key=self._served.__getitem__)]))

    def draw(self, job: Job, most: int) -> Part:
        """Take the next sequences of a job out."""
        positions = job._order[job._drawn : job._drawn + most]
        self._served[job.ticket.stream] += int(job.lengths[positions].sum())
        if job._drawn + len(positions) == len(job.lengths):
            self._drop(job)
        job._drawn += len(positions)
        return job, positions

    def remove(self, job: Job) -> None:
        """Drop all of a job that has not entered the engine."""
        if job._drawn < len(job.lengths):
            self._drop(job)
        if job._entered < job._drawn:
            self.window.remove(job)

    def _drop(self, job: Job) -> None:
        stream = job.ticket.stream
        del self._jobs[stream][job]
        if not self._jobs[stream]:
            del self._jobs[stream], self._served[stream]


class Scheduler:
    """Feeds one engine from any number of jobs; lives on one event loop.

    Attributes:
        waiting: Sequences that have not entered the engine.
        waiting_since: When the oldest job that still waits came, ``time.monotonic()`` seconds; ``None`` if none waits.
    """

    def __init__(self, engine: Engine, metrics: Metrics | None = None) -> None:
        self.waiting = 0
        self.waiting_since: float | None = None
        self._engine = engine
        self._metrics = metrics or Metrics()
        self._interactive = _Queue()
        self._bulk = _Queue()
        self._arrivals: dict[Job, float] = {}
        self._held, self._interactive_held = _Held(), _Held()
        self._batches = 0
        self._pace = Pace()
        self._last_finish = 0.0

    @property
    def running(self) -> int:
        """Sequences inside the engine."""
        return self._held.sequences

    async def run(self, job: Job) -> NDArray[np.float32]:
        """Run a job to its end.

        Returns:
            What the engine gave, in the order of the job's positions; shape ``(n, ...)``.

        Raises:
            EngineDeadError: The engine is gone.

        Cancelling the call withdraws what has not run yet.
        """
        job._end = asyncio.get_running_loop().create_future()
        # The longest first where the engine pads, so that a job larger than a window is sorted as a whole.
        padded = self._engine.batch_tokens is not None
        job._order = np.argsort(-job.lengths, kind="stable") if padded else np.arange(len(job.lengths))
        self._queue(job).push(job)
        self._arrivals[job] = time.monotonic()
        self.waiting_since = self.waiting_since or self._arrivals[job]
        self.waiting += len(job.lengths)
        self._admit()
        try:
            await job._end
        finally:
            self._leave(job)
            for batch in job._running:
                batch.wanted.discard(job)
                if not batch.wanted and batch.task is not None:
                    batch.task.cancel()
        assert job._results is not None
        return job._results

    def _queue(self, job: Job) -> _Queue:
        return self._interactive if job.ticket.interactive else self._bulk

    def _admit(self) -> None:
        budget = self._engine.batch_tokens
        while parts := self._next() if budget is None else self._next_padded(budget):
            self._enter(parts)

    def _next(self) -> list[Part]:
        """Take the next batch out, all of one job; nothing if nothing waits or the engine has no room."""
        engine = self._engine
        queue = self._interactive if self._interactive.first() else self._bulk
        job = queue.first()
        if job is None:
            return []
        count, tokens = job.next_batch(engine.max_batch, engine.step_tokens)
        # What it overtakes inside the engine takes no room from interactive work.
        ahead = self._interactive_held if engine.overtakes and job.ticket.interactive else self._held
        full = ahead.sequences + count > engine.max_in_flight or (
            engine.step_tokens is not None and ahead.tokens + tokens > _STEPS * engine.step_tokens
        )
        # An idle engine takes anything; a busy one waits for room for the whole batch rather than get crumbs.
        if ahead.sequences and full:
            return []
        return [queue.draw(job, count)]

    def _next_padded(self, budget: int) -> list[Part]:
        """Take the next batch of like lengths out, within ``budget`` tokens; nothing as ``_next``."""
        if self._batches >= _PADDED_BATCHES:
            return []
        for queue in (self._interactive, self._bulk):
            if not queue.window and queue.first():
                queue.window.fill(self._draw(queue))
            if queue.window:
                return queue.window.take(budget, self._engine.max_batch)
        return []

    def _draw(self, queue: _Queue) -> list[Part]:
        """Take a window's worth of sequences out."""
        parts: list[Part] = []
        sequences = tokens = 0
        while (job := queue.first()) and not self._pace.fills_window(sequences, tokens, self._engine.max_batch):
            parts.append(queue.draw(job, _TURN))
            positions = parts[-1][1]
            sequences += len(positions)
            tokens += int(job.lengths[positions].sum())
        return parts

    def _enter(self, parts: list[Part]) -> None:
        """Give the engine a batch."""
        batch = _Batch()
        for job, positions in parts:
            try:
                sequences = job.make(positions)
                if len(parts) > 1:
                    # Made now: what is wrong with one job's must not fail the others. A job that is alone has the
                    # engine make them as it reads.
                    sequences = list(sequences)
            except Exception as error:
                self._fail(job, error)
                continue
            batch.parts.append((job, positions))
            batch.sequences.append(sequences)
            batch.wanted.add(job)
            job._running.add(batch)
            job.started = job.started or batch.entered
            tokens = int(job.lengths[positions].sum())
            job.tokens += tokens
            batch.tokens += tokens
            job._entered += len(positions)
            self.waiting -= len(positions)
            if not job.left:
                self._leave(job)
        if not batch.parts:
            return
        self._metrics.batch(len(batch), batch.tokens)
        batch.interactive = parts[0][0].ticket.interactive  # the parts come from one queue
        self._held.add(batch)
        if batch.interactive:
            self._interactive_held.add(batch)
        self._batches += 1
        alone = len(batch.parts) == 1
        sequences = batch.sequences[0] if alone else list(chain.from_iterable(batch.sequences))
        batch.task = asyncio.create_task(self._engine.run(sequences, batch.interactive))
        # A callback, not code around the call: it comes also for a task that is cancelled before it begins.
        batch.task.add_done_callback(partial(self._finished, batch))

    def _finished(self, batch: _Batch, task: asyncio.Task[NDArray[np.float32]]) -> None:
        self._held.remove(batch)
        if batch.interactive:
            self._interactive_held.remove(batch)
        self._batches -= 1
        now = time.monotonic()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            # While it waited for the batch before it, the engine was busy with that one.
            self._pace.add(batch.tokens, now - max(batch.entered, self._last_finish))
        self._last_finish = now
        values = None
        if error is None:
            values = task.result()
        elif isinstance(error, NonFiniteScoreError):
            values = error.values
        row = 0
        for job, positions in batch.parts:
            job._running.discard(batch)
            found = None if values is None else values[row : row + len(positions)]
            row += len(positions)
            if found is None or (error is not None and not np.isfinite(found).all()):
                assert error is not None
                self._fail(job, error)
                continue
            if job._results is None:
                job._results = np.empty((len(job.lengths), *found.shape[1:]), dtype=found.dtype)
            job._results[positions] = found
            job._done += len(positions)
            if job._done == len(job.lengths) and job._end is not None and not job._end.done():
                job._end.set_result(None)
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
        if job._end is None or job._end.done():
            return
        if isinstance(error, asyncio.CancelledError):
            job._end.cancel()
        else:
            job._end.set_exception(error)
