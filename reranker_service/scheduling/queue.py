"""Queue: jobs of one priority that have not entered the engine, shared fairly between streams by tokens."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from .entry import Entry, Part
from .window import Window

_SPARE_TURNS = 64


@dataclass(eq=False, slots=True)
class _Stream:
    """A stream with waiting jobs.

    Attributes:
        number: Number of its arrival: of streams that were given equally many tokens, the first one is next.
        served: Tokens that it has been given.
        entries: Its jobs in order of arrival. An ordered dictionary finds the first one and drops any one in constant
            time; a plain dictionary would search through all that were dropped before.
    """

    number: int
    served: int
    entries: OrderedDict[Entry, None] = field(default_factory=OrderedDict)


_Turn = tuple[int, int, _Stream]
"""Tokens served, number of arrival, stream: the smallest one is next. Stale once its stream has been served."""


class FairQueue:
    """Jobs of one priority. The stream that has been given the fewest tokens so far is next.

    Attributes:
        window: Sequences that were drawn for an engine that pads and have not entered it.
    """

    def __init__(self) -> None:
        self.window = Window()
        self._streams: dict[Hashable, _Stream] = {}
        self._turns: list[_Turn] = []  # a heap with the present turn of each stream, and stale turns
        self._arrived = 0

    def push(self, entry: Entry) -> None:
        """Add a job that has arrived."""
        key = entry.job.ticket.stream
        stream = self._streams.get(key)
        if stream is None:
            # A new stream starts level with the least served one: it neither waits for all others nor overtakes them.
            least = self._next()
            stream = self._streams[key] = _Stream(self._arrived, 0 if least is None else least.served)
            self._arrived += 1
            self._take_turn(stream)
        stream.entries[entry] = None

    def waits(self) -> bool:
        """Whether any sequence has not entered the engine."""
        return bool(self.window) or self._next() is not None

    def first(self) -> Entry | None:
        """The job whose sequences are next; ``None`` if all sequences are drawn."""
        stream = self._next()
        return None if stream is None else next(iter(stream.entries))

    def draw(self, entry: Entry, most: int) -> tuple[Part, int]:
        """Take the next sequences of a job out of the queue, at most ``most``; gives them and their tokens."""
        stream = self._streams[entry.job.ticket.stream]
        positions, tokens = entry.draw(most)
        stream.served += tokens
        if entry.drawn == len(entry.job):
            self._drop(entry)
        if stream.entries:
            self._take_turn(stream)
        return (entry, positions), tokens

    def remove(self, entry: Entry) -> None:
        """Drop all sequences of a job that have not entered the engine."""
        if entry.drawn < len(entry.job):
            self._drop(entry)
        if entry.entered < entry.drawn:
            self.window.remove(entry)

    def _next(self) -> _Stream | None:
        """The stream whose turn it is."""
        while self._turns:
            served, _, stream = self._turns[0]
            if stream.entries and stream.served == served:
                return stream
            heapq.heappop(self._turns)
        return None

    def _take_turn(self, stream: _Stream) -> None:
        """Put a stream in its place among the others."""
        heapq.heappush(self._turns, (stream.served, stream.number, stream))
        if len(self._turns) > 2 * len(self._streams) + _SPARE_TURNS:
            # Turns of streams that have gone are dropped when they come first, which may be never.
            self._turns = [(one.served, one.number, one) for one in self._streams.values()]
            heapq.heapify(self._turns)

    def _drop(self, entry: Entry) -> None:
        key = entry.job.ticket.stream
        stream = self._streams[key]
        del stream.entries[entry]
        if not stream.entries:
            del self._streams[key]
