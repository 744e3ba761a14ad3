"""Queue: jobs of one priority that have not entered the engine, shared fairly between streams by tokens."""

from __future__ import annotations

from collections.abc import Hashable

from .entry import Entry, Part
from .window import Window


class FairQueue:
    """Jobs of one priority. The stream that has been given the fewest tokens so far is next.

    Attributes:
        window: Sequences that were drawn for an engine that pads and have not entered it.
    """

    def __init__(self) -> None:
        self.window = Window()
        # Dictionaries keep a stream's jobs in order of arrival and drop any of them in constant time.
        self._entries: dict[Hashable, dict[Entry, None]] = {}
        self._served: dict[Hashable, int] = {}

    def push(self, entry: Entry) -> None:
        """Add a job that has arrived."""
        stream = entry.job.ticket.stream
        if stream not in self._entries:
            # A new stream starts level with the least served one: it neither waits for all others nor overtakes them.
            self._served[stream] = min(self._served.values(), default=0)
            self._entries[stream] = {}
        self._entries[stream][entry] = None

    def first(self) -> Entry | None:
        """The job whose sequences are next; ``None`` if all sequences are drawn."""
        if not self._entries:
            return None
        return next(iter(self._entries[min(self._entries, key=self._served.__getitem__)]))

    def draw(self, entry: Entry, most: int) -> Part:
        """Take the next sequences of a job out of the queue, at most ``most``."""
        positions = entry.draw(most)
        self._served[entry.job.ticket.stream] += entry.tokens(positions)
        if entry.drawn == len(entry.job):
            self._drop(entry)
        return entry, positions

    def remove(self, entry: Entry) -> None:
        """Drop all sequences of a job that have not entered the engine."""
        if entry.drawn < len(entry.job):
            self._drop(entry)
        if entry.entered < entry.drawn:
            self.window.remove(entry)

    def _drop(self, entry: Entry) -> None:
        stream = entry.job.ticket.stream
        del self._entries[stream][entry]
        if not self._entries[stream]:
            del self._entries[stream], self._served[stream]
