"""Window: sequences of many jobs, sorted by length and cut into batches by tokens, for an engine that pads.

A larger window needs less padding, but its first job waits longer. A window therefore holds about half a second of the
engine's work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .entry import Entry, Part

_WINDOW_SECONDS = 0.5
_MOST_SEQUENCES = 4096
_HALF_LIFE_SECONDS = 2.0


class Pace:
    """Throughput of the engine in tokens a second, over the time that it was busy recently.

    Tokens rather than sequences count: the short sequences at a window's end would make the engine look fast.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count finished work. Earlier work counts half after two busy seconds."""
        keep = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds

    def fills_window(self, sequences: int, tokens: int, least: int) -> bool:
        """Whether some sequences fill a window: half a second's work, at least ``least`` and at most 4,096 sequences.

        Args:
            sequences: Number of sequences.
            tokens: Their tokens together.
            least: Fewest sequences of a window, even if the engine is slow.
        """
        if sequences < least:
            return False
        # Before the first measurement both sides are 0: the fewest sequences fill a window.
        return sequences >= _MOST_SEQUENCES or tokens * self._seconds >= _WINDOW_SECONDS * self._tokens


class Window:
    """Sequences that share batches and have not entered the engine, longest first."""

    def __init__(self) -> None:
        self._entries: dict[Entry, int] = {}  # entry to its number in _owners
        self._owners = self._positions = np.empty(0, dtype=np.intp)
        self._lengths = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._positions)

    def fill(self, parts: Sequence[Part]) -> None:
        """Put sequences into an empty window."""
        self._entries = {}
        for entry, _ in parts:
            self._entries.setdefault(entry, len(self._entries))
        lengths = np.concatenate([entry.job.lengths[positions] for entry, positions in parts])
        order = np.argsort(-lengths, kind="stable")
        owners = np.repeat([self._entries[entry] for entry, _ in parts], [len(positions) for _, positions in parts])
        self._owners = owners[order]
        self._positions = np.concatenate([positions for _, positions in parts])[order]
        self._lengths = lengths[order]

    def take(self, tokens: int, most: int) -> list[Part]:
        """Take the next batch out: at least one sequence, at most ``most``, within ``tokens`` padding included."""
        count = min(max(tokens // max(int(self._lengths[0]), 1), 1), most)
        owners, positions = self._owners[:count], self._positions[:count]
        entries = list(self._entries)
        parts = [(entries[owner], positions[owners == owner]) for owner in np.unique(owners)]
        self._keep(slice(count, None))
        return parts

    def remove(self, entry: Entry) -> None:
        """Drop all sequences of a job."""
        if entry in self._entries:
            self._keep(self._owners != self._entries[entry])

    def _keep(self, which: slice | NDArray[np.bool_]) -> None:
        self._owners, self._positions = self._owners[which], self._positions[which]
        self._lengths = self._lengths[which]
