"""Batches for an engine that pads: sequences of many jobs are drawn together, sorted by length and cut by tokens.

The more sequences are sorted together, the less is padded; the longer it takes until all of them are done, the longer
the first job of them waits. So a window holds what the engine gets through in about half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .scheduler import Job

Part = tuple["Job", NDArray[np.intp]]
"""A job and positions of some of its sequences."""

_WINDOW_SECONDS = 0.5
_MOST_SEQUENCES = 4096
_HALF_LIFE_SECONDS = 2.0


class Pace:
    """How many tokens the engine gets through, by the time that it was busy of late.

    Tokens rather than sequences: a window begins with the longest, and its end would make the engine look fast.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count work that is done; what came before it counts half after two busy seconds."""
        keep = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds

    def fills_window(self, sequences: int, tokens: int, least: int) -> bool:
        """Whether so many sequences make a window: half a second's work, but at least ``least`` and at most 4,096.

        Args:
            sequences: How many were drawn.
            tokens: How many tokens they have together.
            least: How many sequences are drawn however slow the engine is.
        """
        if sequences < least:
            return False
        # With nothing known yet the least is enough.
        return sequences >= _MOST_SEQUENCES or tokens * self._seconds >= _WINDOW_SECONDS * self._tokens


class Window:
    """Sequences that share batches and have not entered the engine, the longest first."""

    def __init__(self) -> None:
        self._jobs: dict[Job, int] = {}  # each with its number in _owners
        self._owners = self._positions = np.empty(0, dtype=np.intp)
        self._lengths = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._positions)

    def fill(self, parts: Sequence[Part]) -> None:
        """Take in the next sequences; the window is empty before."""
        self._jobs = {}
        for job, _ in parts:
            self._jobs.setdefault(job, len(self._jobs))
        lengths = np.concatenate([job.lengths[positions] for job, positions in parts])
        order = np.argsort(-lengths, kind="stable")
        owners = np.repeat([self._jobs[job] for job, _ in parts], [len(positions) for _, positions in parts])
        self._owners = owners[order]
        self._positions = np.concatenate([positions for _, positions in parts])[order]
        self._lengths = lengths[order]

    def take(self, tokens: int, most: int) -> list[Part]:
        """Take the next batch out: at least one sequence, at most ``most``, within ``tokens`` with their padding."""
        count = min(max(tokens // max(int(self._lengths[0]), 1), 1), most)
        owners, positions = self._owners[:count], self._positions[:count]
        jobs = list(self._jobs)
        parts = [(jobs[owner], positions[owners == owner]) for owner in np.unique(owners)]
        self._keep(slice(count, None))
        return parts

    def remove(self, job: Job) -> None:
        """Drop what is left of a job."""
        if job in self._jobs:
            self._keep(self._owners != self._jobs[job])

    def _keep(self, which: slice | NDArray[np.bool_]) -> None:
        self._owners, self._positions = self._owners[which], self._positions[which]
        self._lengths = self._lengths[which]
