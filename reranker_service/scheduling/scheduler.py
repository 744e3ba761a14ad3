"""Scheduler: admits the work of many clients into one engine.

The scheduler gives the engine batches of sequences, at any time only as many as keep it busy: work that has not entered
the engine can still be overtaken or withdrawn. Interactive work goes first, and also overtakes inside an engine that
supports it; bulk work gets a share while interactive work never ends. Among streams of one priority, the stream that
was given the fewest tokens so far is next, so that a stream with many waiting chunks cannot starve another one.

A batch for an engine without padding is a run of sequences of one job. A batch for an engine that pads has sequences of
similar length, taken from a window over all waiting jobs. Such an engine holds two batches, the running one and the
next one.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ..engines import Engine, PartialResultError, TokenSequence, WrongResultError, one_each
from ..observing.metrics import Metrics
from .entry import Entry, Part
from .job import Job, JobResult
from .queue import FairQueue
from .share import BulkShare
from .window import Pace

_PADDED_BATCHES = 2
# Steps of work inside an engine without padding: the running one, and enough until the next batches come.
_STEPS = 4
# Sequences that a stream puts into a window before the next stream's turn.
_TURN = 32
# Interactive batches count with at least this part of a full batch in the share of bulk work. A GPU takes some
# milliseconds for a batch however small it is, and some hundreds for a full one.
_LEAST_PART = 1 / 64


@dataclass(eq=False, slots=True)
class _Batch:
    """Sequences of one call of the engine: parts of one job or of several jobs.

    Attributes:
        parts: The parts.
        sequences: The sequences of each part.
        tokens: Tokens of all sequences.
        urgent: Whether the sequences overtake others inside the engine.
        entered: Time at which the batch entered the engine, ``time.monotonic()`` seconds.
        wanted: Jobs that still wait for the batch's results.
        task: The engine's call.
    """

    parts: list[Part] = field(default_factory=list)
    sequences: list[Sequence[TokenSequence]] = field(default_factory=list)
    tokens: int = 0
    urgent: bool = False
    entered: float = field(default_factory=lambda: time.monotonic())
    wanted: set[Entry] = field(default_factory=set)
    task: asyncio.Task[NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        return sum(len(positions) for _, positions in self.parts)


@dataclass(slots=True)
class _InFlight:
    """Batches, sequences and tokens inside the engine."""

    batches: int = 0
    sequences: int = 0
    tokens: int = 0

    def add(self, batch: _Batch) -> None:
        self.batches += 1
        self.sequences += len(batch)
        self.tokens += batch.tokens

    def remove(self, batch: _Batch) -> None:
        self.batches -= 1
        self.sequences -= len(batch)
        self.tokens -= batch.tokens


class Scheduler:
    """Feeds one engine from any number of jobs; all calls come from one event loop.

    Attributes:
        engine: The engine; started.
        metrics: Receives the size of each batch.
        bulk_share: Part of the tokens that bulk work is given while interactive work waits too.
        waiting: Number of sequences that have not entered the engine.
        finished: Number of sequences that the engine has finished.
        waiting_since: Time of arrival of the oldest waiting job, ``time.monotonic()`` seconds; ``None`` if none waits.
    """

    def __init__(self, engine: Engine, metrics: Metrics | None = None, bulk_share: float = 0.0) -> None:
        self.engine = engine
        self.metrics = metrics or Metrics()
        self.bulk_share = bulk_share
        self.waiting = 0
        self.finished = 0
        self.waiting_since: float | None = None
        self._interactive = FairQueue()
        self._bulk = FairQueue()
        full = engine.batch_tokens or engine.step_tokens or 0
        self._share = BulkShare(bulk_share, least=_LEAST_PART * full)
        self._arrivals: OrderedDict[Entry, None] = OrderedDict()  # waiting jobs in order of arrival
        self._batches: dict[Entry, set[_Batch]] = {}  # batches inside the engine, by the jobs that they belong to
        self._in_flight, self._urgent_in_flight = _InFlight(), _InFlight()
        self._pace = Pace()
        self._last_finish = 0.0
        self._held_since: float | None = None  # time from which the engine has held work without a result
        self._held_before = 0.0  # seconds of earlier work that ended without a result, because its callers had gone

    @property
    def running(self) -> int:
        """Number of sequences inside the engine."""
        return self._in_flight.sequences

    def stalled_seconds(self) -> float:
        """Time for which the engine has held work since it last finished a batch; 0 after a batch.

        The end of a batch whose callers have gone does not count as finished: a stuck engine would look well whenever
        its callers give up. Time in which the engine holds no work does not count.
        """
        since = 0.0 if self._held_since is None else time.monotonic() - self._held_since
        return self._held_before + since

    async def run(self, job: Job) -> JobResult:
        """Run a job to its end.

        Cancelling the call withdraws the sequences that have not entered the engine, and cancels batches that no
        other job waits for.

        Raises:
            EngineDeadError: The engine is gone.
        """
        entry = Entry(job, longest_first=self.engine.batch_tokens is not None)
        self._queue(entry).push(entry)
        self._arrivals[entry] = None
        self.waiting_since = self.waiting_since or entry.arrived
        self.waiting += len(job)
        self._admit()
        try:
            await entry.end
        finally:
            self._leave(entry)
            for batch in self._batches.pop(entry, ()):
                batch.wanted.discard(entry)
                if not batch.wanted and batch.task is not None:
                    batch.task.cancel()
        return entry.result()

    def _queue(self, entry: Entry) -> FairQueue:
        return self._interactive if entry.job.ticket.interactive else self._bulk

    def _admit(self) -> None:
        while batch := self._next():
            self._enter(*batch)

    def _next(self) -> tuple[list[Part], bool] | None:
        """Take the next batch, and whether it is urgent; ``None`` if no job waits or the engine has no room."""
        interactive, bulk = self._interactive.waits(), self._bulk.waits()
        if not interactive and not bulk:
            return None
        contested = interactive and bulk
        turn = not interactive or (bulk and self._share.is_due())
        queue = self._bulk if turn else self._interactive
        # Bulk work that overtakes interactive work in the queue also overtakes other bulk work inside the engine.
        urgent = interactive
        budget = self.engine.batch_tokens
        parts = self._take(queue, urgent) if budget is None else self._take_padded(queue, budget)
        if not parts:
            return None
        self._share.give(sum(entry.tokens(one) for entry, one in parts), bulk=turn, contested=contested)
        return parts, urgent

    def _take(self, queue: FairQueue, urgent: bool) -> list[Part]:
        """Take a batch, all of one job; empty if the engine has no room."""
        engine = self.engine
        entry = queue.first()
        assert entry is not None
        count, tokens = entry.next_batch(engine.max_batch, engine.step_tokens)
        # Work that is overtaken inside the engine takes no room from urgent work.
        ahead = self._urgent_in_flight if engine.overtakes and urgent else self._in_flight
        full = ahead.sequences + count > engine.max_in_flight or (
            engine.step_tokens is not None and ahead.tokens + tokens > _STEPS * engine.step_tokens
        )
        # An idle engine takes a batch of any size. A busy one waits until the whole batch fits.
        if ahead.sequences and full:
            return []
        part, _ = queue.draw(entry, count)
        return [part]

    def _take_padded(self, queue: FairQueue, budget: int) -> list[Part]:
        """Take a batch of sequences of similar length, within ``budget`` tokens; empty as ``_take``."""
        if self._in_flight.batches >= _PADDED_BATCHES:
            return []
        if not queue.window:
            queue.window.fill(self._draw_window(queue))
        return queue.window.take(budget, self.engine.max_batch)

    def _draw_window(self, queue: FairQueue) -> list[Part]:
        """Draw the sequences of the next window, a few of each stream in turn."""
        parts: list[Part] = []
        sequences = tokens = 0
        while (entry := queue.first()) and not self._pace.fills_window(sequences, tokens, self.engine.max_batch):
            part, drawn = queue.draw(entry, _TURN)
            parts.append(part)
            sequences += len(part[1])
            tokens += drawn
        return parts

    def _enter(self, parts: list[Part], urgent: bool) -> None:
        """Give the engine a batch."""
        batch = _Batch(urgent=urgent)
        for entry, positions in parts:
            try:
                sequences = entry.job.make(positions)
                if len(parts) > 1:
                    # Made now, so that an error in one job's sequences does not fail the other jobs of the batch. The
                    # sequences of a batch of one job are made when the engine reads them.
                    sequences = list(sequences)
            except Exception as error:
                self._fail(entry, error)
                continue
            batch.parts.append((entry, positions))
            batch.sequences.append(sequences)
            batch.wanted.add(entry)
            self._batches.setdefault(entry, set()).add(batch)
            batch.tokens += entry.tokens(positions)
            entry.started = entry.started or batch.entered
            entry.entered += len(positions)
            self.waiting -= len(positions)
            if not entry.waiting:
                self._leave(entry)
        if not batch.parts:
            return
        self.metrics.batch(len(batch), batch.tokens)
        self._in_flight.add(batch)
        if self._held_since is None:
            self._held_since = batch.entered
        if batch.urgent:
            self._urgent_in_flight.add(batch)
        alone = len(batch.parts) == 1
        sequences = batch.sequences[0] if alone else list(chain.from_iterable(batch.sequences))
        batch.task = asyncio.create_task(self.engine.run(sequences, batch.urgent))
        # A callback also comes for a task that is cancelled before it begins; code around the engine's call would not.
        batch.task.add_done_callback(partial(self._finished, batch))

    def _finished(self, batch: _Batch, task: asyncio.Task[NDArray[np.float32]]) -> None:
        self._in_flight.remove(batch)
        if batch.urgent:
            self._urgent_in_flight.remove(batch)
        error, values = self._outcome(batch, task)
        row = 0
        for entry, positions in batch.parts:
            found = None if values is None else values[row : row + len(positions)]
            row += len(positions)
            self._batches.get(entry, set()).discard(batch)
            if found is None or (error is not None and not np.isfinite(found).all()):
                assert error is not None
                self._fail(entry, error)
                continue
            try:
                entry.put(positions, found)
            except WrongResultError as wrong:
                self._fail(entry, wrong)
        self._admit()

    def _outcome(
        self, batch: _Batch, task: asyncio.Task[NDArray[np.float32]]
    ) -> tuple[BaseException | None, NDArray[np.float32] | None]:
        """The error of a batch, if there was one, and its results; ``None`` if it has none.

        Results are checked here, before they are distributed: an error in this callback would end no job, and the
        jobs and all later ones would wait for ever.
        """
        now = time.monotonic()
        if task.cancelled():
            if not self._in_flight.batches and self._held_since is not None:
                self._held_before += now - self._held_since
                self._held_since = None
            self._last_finish = now
            return asyncio.CancelledError(), None
        self._held_before = 0.0
        self._held_since = now if self._in_flight.batches else None
        error = task.exception()
        if error is None:
            self.finished += len(batch)
            # The engine was busy with the batch before this one until that one finished.
            self._pace.add(batch.tokens, max(now - max(batch.entered, self._last_finish), 0.0))
        self._last_finish = now
        if error is not None and not isinstance(error, PartialResultError):
            return error, None
        try:
            return error, one_each(task.result() if error is None else error.values, len(batch))
        except WrongResultError as wrong:
            return wrong, None

    def _leave(self, entry: Entry) -> None:
        """Take a job out of the queue: all of it is in the engine, or its caller has gone."""
        if entry not in self._arrivals:
            return
        del self._arrivals[entry]
        self._queue(entry).remove(entry)
        self.waiting -= entry.waiting
        oldest = next(iter(self._arrivals), None)
        self.waiting_since = None if oldest is None else oldest.arrived

    def _fail(self, entry: Entry, error: BaseException) -> None:
        self._leave(entry)
        entry.fail(error)
