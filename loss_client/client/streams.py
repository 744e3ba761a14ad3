"""Streams of one job that run at the same time at several servers, and the chunks that two of them have asked for.

The last chunks of a job may wait at a slow server while other servers have no work. A stream without work then asks for
such a chunk a second time. The first answer counts; the other stream gives the chunk up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Protocol

from loss_client.client.chunks import Chunk
from loss_client.client.endpoints import Endpoint
from loss_client.client.progress import Progress
from loss_client.client.window import LEAST_CHUNK_PAIRS, Window

# A second server has to be this much faster, in the expected time to the answer, to be asked.
_FASTER = 1.5
# Expected time of a server that has not answered yet.
_UNKNOWN_SECONDS = 1.0


class Member(Protocol):
    """A stream of the job.

    Attributes:
        endpoint: The server.
        unanswered: Chunks without an answer by their ids on the stream, in order of sending.
        window: Limit of its unanswered pairs; None before the server has opened the stream.
    """

    endpoint: Endpoint
    unanswered: dict[int, Chunk]
    window: Window | None

    def wake(self) -> None:
        """Let the stream look for chunks again."""

    def give_up(self, chunk: Chunk) -> None:
        """Drop an unanswered chunk and its later answer."""


class Streams:
    """The open streams of one job.

    Args:
        progress: The part of the job without scores.
        changed: Called when further streams may be of use or the job has all scores.

        parallel: Whether the client has several servers, or a host name that may get further ones.

    Attributes:
        progress: See above.
        parallel: See above.
        members: All streams, also those that still open.
    """

    def __init__(self, progress: Progress, changed: Callable[[], object], *, parallel: bool) -> None:
        self.progress = progress
        self.parallel = parallel
        self.members: list[Member] = []
        self._changed = changed
        self._twice: dict[Chunk, list[Member]] = {}

    def add(self, stream: Member) -> None:
        """Note that a stream begins."""
        self.members.append(stream)

    def remove(self, stream: Member) -> None:
        """Note that a stream ended; its chunks without an answer go to others."""
        self.members.remove(stream)
        self.give_back(stream, list(stream.unanswered.values()))

    def give_back(self, stream: Member, chunks: Iterable[Chunk]) -> None:
        """Let other streams take chunks of ``stream``, but for those that another stream has asked for as well."""
        alone = []
        for chunk in chunks:
            holders = self._twice.pop(chunk, None)
            if holders is None or stream not in holders:
                alone.append(chunk)
        self.progress.give_back(alone)
        self.wake()

    def answered(self, stream: Member, chunk: Chunk) -> None:
        """Note that the first answer to a chunk has been taken."""
        for other in self._twice.pop(chunk, ()):
            if other is not stream:
                other.give_up(chunk)
        if self.progress.pairs_left == 0:
            self.wake()

    def wake(self) -> None:
        """Let all streams look for chunks again."""
        for stream in self.members:
            stream.wake()
        self._changed()

    def alone(self) -> bool:
        """Whether there is only one stream."""
        return len(self.members) == 1

    def planned(self) -> None:
        """Note that the job has been cut into chunks."""
        self._changed()

    def shared(self, chunk: Chunk) -> bool:
        """Whether two streams have asked for a chunk."""
        return chunk in self._twice

    def room(self, stream: Member, window: Window) -> int:
        """Return the most pairs that a stream may take now; 0 or less if it has enough.

        Near the end of a job each stream has only as many pairs in flight as its server answers until all of them are
        answered, so that all servers finish at the same time.

        Args:
            stream: The stream.
            window: Its window.
        """
        rates = [one.window.rate for one in self.members if one.window is not None and one.window.rate]
        if len(self.members) == 1 or not rates:
            share = 1 / len(self.members)
        else:
            usual = sum(rates) / len(rates)
            share = (window.rate or usual) / (sum(rates) + usual * (len(self.members) - len(rates)))
        room = math.ceil(self.progress.pairs_left * share) - window.in_flight
        return max(room, LEAST_CHUNK_PAIRS) if room > 0 else 0

    def late_chunk(self, stream: Member, own: Window) -> Chunk | None:
        """Choose a chunk of another stream that ``stream`` may answer sooner; None if there is none.

        Args:
            stream: A stream without work.
            own: Its window.
        """
        latest, chosen = 0.0, None
        for other in self.members:
            if other is stream or other.window is None:
                continue
            for chunk, seconds in _expected(other, other.window):
                mine = own.seconds(chunk.pairs) if own.rate else _UNKNOWN_SECONDS
                if chunk not in self._twice and seconds > max(latest, _FASTER * mine):
                    latest, chosen = seconds, (chunk, other)
        if chosen is None:
            return None
        self._twice[chosen[0]] = [chosen[1], stream]
        return chosen[0]


def _expected(stream: Member, window: Window) -> Iterable[tuple[Chunk, float]]:
    """Yield (chunk, expected seconds until its answer) for each unanswered chunk of a stream.

    A server that has been silent is expected to be silent for as long again.
    """
    silent = asyncio.get_running_loop().time() - window.answered_at
    ahead = 0
    for chunk in stream.unanswered.values():
        ahead += chunk.pairs
        yield chunk, max(ahead / window.rate if window.rate else 0.0, silent)
