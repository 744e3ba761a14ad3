"""Ledger: counts of the scores that callers asked for and got, independent of the client's own counts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from loss_client.client.scores import Positions, ScoreMatrix


class CountedMatrix(ScoreMatrix):
    """A score matrix that also keeps every score that it is given, how often, and when.

    Attributes:
        values: The last score of each stored cell; NaN where none arrived.
        arrivals: Number of scores that arrived for each stored cell.
        longest_pause: Longest time without a new score so far, in seconds, from the start of the job on.
    """

    def __init__(self, shape: tuple[int, int], **options: Any) -> None:
        super().__init__(shape, **options)
        stored = (len(self._missing), self._columns)
        self.values = np.full(stored, np.nan, dtype=np.float32)
        self.arrivals = np.zeros(stored, dtype=np.uint8)
        self.longest_pause = 0.0
        self._last = time.monotonic()

    def put(self, rows: Positions, columns: slice, block: NDArray[np.float32]) -> None:
        """Count scores, then store them; see the base class."""
        self.note_pause()
        self.values[rows, columns] = block
        self.arrivals[rows, columns] += 1
        super().put(rows, columns, block)

    def note_pause(self) -> None:
        """Let the present time without a score count, and begin another."""
        now = time.monotonic()
        self.longest_pause = max(self.longest_pause, now - self._last)
        self._last = now

    def visible(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return the cells that the caller sees, shape ``shape``, of an array over the stored ones."""
        rows = stored if self._row_ids is None else stored[self._row_ids]
        return rows if self._column_ids is None else rows[:, self._column_ids]


@contextmanager
def counted_matrices() -> Iterator[None]:
    """Have all clients of this process make ``CountedMatrix`` for their jobs, as long as the context lasts."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("loss_client.client.") and getattr(module, "ScoreMatrix", None) is ScoreMatrix:
                stack.enter_context(mock.patch.object(module, "ScoreMatrix", CountedMatrix))
        yield


@dataclass(slots=True)
class Ledger:
    """Counts of all jobs and calls under one fault; threads may add to it at the same time.

    Attributes:
        jobs: Jobs that have ended.
        asked: Pairs that callers asked for.
        wrong: Of these, pairs that got another score than the right one.
        missing: Of these, pairs that got none.
        twice: Of these, pairs that got a score more than once.
        longest_pause: Longest time of a job without a new score, in seconds.
        errors: Errors that callers saw.
        notes: Events worth a count, by name.
    """

    jobs: int = 0
    asked: int = 0
    wrong: int = 0
    missing: int = 0
    twice: int = 0
    longest_pause: float = 0.0
    errors: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def job(self, matrix: ScoreMatrix, right: NDArray[np.float32], tolerance: float = 0.0) -> None:
        """Count a job that has ended.

        Args:
            matrix: The scores that the job's caller got.
            right: The right scores, in the shape that the caller sees.
            tolerance: Largest difference of a right score.
        """
        assert isinstance(matrix, CountedMatrix)
        if not matrix.arrivals.all():
            matrix.note_pause()
        found, arrivals = matrix.visible(matrix.values), matrix.visible(matrix.arrivals)
        assert found.shape == right.shape
        with self._lock:
            self.jobs += 1
            self.longest_pause = max(self.longest_pause, matrix.longest_pause)
            self.twice += int(np.count_nonzero(arrivals > 1))
            self._count(found, right, tolerance)
        self.note("reconnects", matrix.usage.reconnects)

    def call(self, found: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Count a unary call; ``found`` has NaN for pairs without a score."""
        with self._lock:
            self._count(found, right)

    def error(self, error: BaseException | str) -> None:
        """Count an error that a caller saw, or another event that must not happen."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        with self._lock:
            self.errors.append(text)

    def note(self, name: str, count: int = 1) -> None:
        """Count events."""
        with self._lock:
            self.notes[name] = self.notes.get(name, 0) + count

    def record(self) -> dict[str, Any]:
        """Return the counts as a JSON object."""
        names = ("jobs", "asked", "wrong", "missing", "twice", "longest_pause", "errors", "notes")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Ledger:
        """Return the ledger of a record that another process made."""
        return cls(**record)

    def _count(self, found: NDArray[np.float32], right: NDArray[np.float32], tolerance: float = 0.0) -> None:
        none = np.isnan(found)
        self.asked += found.size
        self.missing += int(np.count_nonzero(none))
        self.wrong += int(np.count_nonzero(np.abs(found - right) > tolerance))
