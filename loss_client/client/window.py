"""Window: the number of unanswered pairs that keeps one server busy, adapted to how it answers."""

from __future__ import annotations

# The server computes one chunk while the next one waits.
_CHUNKS = 2
# Most pairs of a chunk for a server whose speed is not known yet, which may be a slow one.
_FIRST_CHUNK_PAIRS = 256
# Work in the server for this long covers a client whose event loop waits for the trainer's own Python code.
_SLACK_SECONDS = 0.1
# A chunk of a slow server takes no longer, so that its rows do not come long after those of fast servers.
_CHUNK_SECONDS = 1.0
# Chunks that grow beyond the usual size take no longer, so that servers finish at about the same time.
_GROWN_CHUNK_SECONDS = 0.25
LEAST_CHUNK_PAIRS = 16
"""Pairs to which a chunk may be cut for a slow server, and at the end of a job."""
_DECAY = 0.25
_SHORTEST_SECONDS = 1e-4


class Window:
    """Limit of the unanswered pairs of one stream.

    The limit is the pairs that the server answers in two round trips and a slack. A round trip is the shortest time
    from sending a chunk to its answer. So the limit grows as long as more pairs in flight raise the rate, and a server
    that is twice as fast gets twice as many pairs.

    Args:
        chunk_pairs: Most pairs of a chunk.
        most: Greatest limit, in pairs.
        grown_pairs: Most pairs of a chunk for a server that answers more than ``chunk_pairs`` in a quarter of a second.
            Default: ``chunk_pairs``.

    Attributes:
        pairs: The limit.
        rate: Pairs that the server answers in a second; 0 before the first answer.
        round_trip: Seconds of the shortest time from sending a chunk to its answer; 0 before the first answer.
        in_flight: Pairs without an answer.
        answered_at: Loop time of the last answer, or of the first chunk before any answer.
    """

    def __init__(self, chunk_pairs: int, most: int, *, grown_pairs: int = 0) -> None:
        self.pairs = first_pairs(chunk_pairs)
        self.rate = self.round_trip = self.answered_at = 0.0
        self._chunk_pairs, self._grown_pairs = chunk_pairs, grown_pairs
        self._most = max(most, 1)
        self.in_flight = self._answered = 0
        self._sent: dict[int, tuple[int, float, int]] = {}  # pairs, loop time, pairs answered before, by chunk id

    @property
    def open(self) -> bool:
        """Whether another chunk may be sent. The last one may exceed the limit."""
        return self.in_flight < min(self.pairs, self._most)

    @property
    def chunk_pairs(self) -> int:
        """Most pairs of the next chunk; fewer for a slow server, and for one whose speed is not known yet."""
        pairs = max(int(self.rate * _CHUNK_SECONDS), LEAST_CHUNK_PAIRS) if self.rate else _FIRST_CHUNK_PAIRS
        grown = min(int(self.rate * _GROWN_CHUNK_SECONDS), self._grown_pairs)
        return max(min(pairs, self._chunk_pairs), grown)

    def sent(self, chunk_id: int, pairs: int, now: float) -> None:
        """Count a chunk as unanswered from ``now`` on, the loop's time."""
        if not self._sent:
            self.answered_at = now
        self._sent[chunk_id] = (pairs, now, self._answered)
        self.in_flight += pairs

    def answered(self, chunk_id: int, now: float, scored: bool = True) -> None:
        """Adapt the limit to an answer.

        Args:
            chunk_id: The chunk.
            now: The loop's time.
            scored: Whether the answer has scores; an answer without them says nothing about the rate.
        """
        pairs, sent_at, before = self._sent.pop(chunk_id)
        self.in_flight -= pairs
        self.answered_at = now
        if not scored:
            return
        self._answered += pairs
        seconds = max(now - sent_at, _SHORTEST_SECONDS)
        self.round_trip = min(self.round_trip or seconds, seconds)
        rate = (self._answered - before) / seconds
        self.rate = max(rate, self.rate + _DECAY * (rate - self.rate))
        self.pairs = max(round(self.rate * (2 * self.round_trip + _SLACK_SECONDS)), _CHUNKS * self.chunk_pairs)

    def seconds(self, pairs: int) -> float:
        """Estimate the seconds from sending ``pairs`` to an idle server to their answer; infinite before any answer."""
        return max(self.round_trip, pairs / self.rate) if self.rate else float("inf")


def first_pairs(chunk_pairs: int) -> int:
    """Return the pairs that a stream sends before it knows its server.

    Args:
        chunk_pairs: Most pairs of a chunk.
    """
    return _CHUNKS * min(chunk_pairs, _FIRST_CHUNK_PAIRS)
