"""Admission: limits of what all calls together may take up, and counts of the pairs that the server works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .budget import Account, Budget
from .errors import BusyError
from .turns import Turns


class Admission:
    """Limits of all calls together.

    Attributes:
        budget: Bytes that the server holds for its clients.
        stream_idle_seconds: Seconds without a message after which a stream with nothing to compute is ended.
        pairs: Pairs that the server has read and not yet answered.
        streams: Open streams.
        turns: Order in which streams handle their messages.
    """

    def __init__(
        self, memory_bytes: int = 2 << 30, max_streams: int = 1024, stream_idle_seconds: float = 300.0
    ) -> None:
        """Set the limits; see the settings of the same names."""
        self.budget = Budget(memory_bytes)
        self.stream_idle_seconds = stream_idle_seconds
        self.pairs = 0
        self.streams = 0
        self.turns = Turns()
        self._max_streams = max_streams

    @contextmanager
    def ranking(self, pairs: int) -> Iterator[None]:
        """Count the pairs of a ranking as long as the context lasts."""
        self.pairs += pairs
        try:
            yield
        finally:
            self.pairs -= pairs

    @contextmanager
    def stream(self, in_flight: Callable[[], bool]) -> Iterator[Account]:
        """Count a stream as long as the context lasts; gives its account.

        Raises:
            BusyError: As many streams are open as are allowed.
        """
        if self.streams >= self._max_streams:
            raise BusyError(
                f"{self.streams} streams are open, which is the limit; try again later, or raise --max-streams"
            )
        self.streams += 1
        account = self.budget.open(in_flight)
        try:
            yield account
        finally:
            self.streams -= 1
            account.close()
