"""Scores that are still arriving: a matrix whose rows can be read as soon as they are complete."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loss_client.errors import JobCancelledError, RerankerError, RerankerTimeoutError
from reranker.v1 import reranker_pb2

ScoreType = Literal["probability", "raw"]
"""How scores are expressed: a number in [0, 1], or the model's own (a logit; for a bi-encoder the cosine)."""

Positions = slice | Sequence[int] | NDArray[np.integer[Any]]


@dataclass(slots=True)
class ScoreUsage:
    """What a job's scores have cost so far. Pairs are counted after equal ones were made one.

    Attributes:
        pairs: Pairs whose scores have arrived.
        cached_pairs: Of these, pairs whose score the server had in its cache.
        shared_pairs: Of these, pairs that shared the score of an identical pair in the server.
        truncated_pairs: Of these, pairs with a text that was cut to fit the length limit.
        tokens: Tokens given to the model.
        reconnects: Streams that were lost and begun again.
    """

    pairs: int = 0
    cached_pairs: int = 0
    shared_pairs: int = 0
    truncated_pairs: int = 0
    tokens: int = 0
    reconnects: int = 0

    def add(self, usage: reranker_pb2.Usage) -> None:
        """Add what one reply has cost."""
        self.pairs += usage.pairs
        self.cached_pairs += usage.cached_pairs
        self.shared_pairs += usage.shared_pairs
        self.truncated_pairs += usage.truncated_pairs
        self.tokens += usage.tokens


class ScoreMatrix:
    """A matrix of scores, shape ``(Q, D)``, float32, that another thread fills block by block.

    Readers block until the rows that they ask for are complete, and no longer. Any number of threads may read.

    Args:
        shape: ``(Q, D)``: queries, documents.
        row_ids: For each of the Q rows the stored row that holds its scores, where several rows share one.
            Default: every row is its own.
        column_ids: The same for the D columns.
        on_cancel: Called once by ``cancel`` while scores are missing.

    Attributes:
        shape: ``(Q, D)``.
        seconds_waited: Seconds that callers were blocked, summed over all of them.
        usage: What the scores have cost so far.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        row_ids: NDArray[np.int64] | None = None,
        column_ids: NDArray[np.int64] | None = None,
        on_cancel: Callable[[], object] | None = None,
    ) -> None:
        self.shape = shape
        self.seconds_waited = 0.0
        self.usage = ScoreUsage()
        self._row_ids = row_ids
        self._column_ids = column_ids
        rows = shape[0] if row_ids is None else int(row_ids.max(initial=-1)) + 1
        columns = shape[1] if column_ids is None else int(column_ids.max(initial=-1)) + 1
        self._scores = np.empty((rows, columns), dtype=np.float32)
        self._missing = np.full(rows, columns, dtype=np.int64)  # scores that each stored row waits for
        self._rows_missing = rows if columns else 0
        self._error: BaseException | None = None
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._process = os.getpid()

    def rows(self, begin: int, end: int, timeout: float | None = None) -> NDArray[np.float32]:
        """Return rows ``begin`` to ``end`` (excluded), shape ``(end - begin, D)``, as soon as they are complete.

        Args:
            begin: First row.
            end: One past the last row.
            timeout: Most seconds to wait. Default: as long as the job lasts.

        Raises:
            IndexError: There are no such rows.
            RerankerTimeoutError: The rows were not complete in time.
            RerankerError: The job failed or was cancelled before these rows were complete.
        """
        if not 0 <= begin <= end <= self.shape[0]:
            raise IndexError(f"rows {begin} to {end} of a matrix with {self.shape[0]} rows")
        stored: Positions = slice(begin, end) if self._row_ids is None else self._row_ids[begin:end]
        self._wait(lambda: not self._missing[stored].any(), timeout, f"rows {begin} to {end}")
        block = self._scores[stored]
        # Callers may write into what they get: never hand out the store itself.
        return block.copy() if self._column_ids is None else block[:, self._column_ids]

    def result(self, timeout: float | None = None) -> NDArray[np.float32]:
        """Return the whole matrix, shape ``(Q, D)``, once it is complete. Raises what ``rows`` raises."""
        return self.rows(0, self.shape[0], timeout)

    def done(self) -> bool:
        """Whether nothing more will arrive: all scores are there, or the job failed or was cancelled."""
        return self._rows_missing == 0 or self._error is not None

    def cancel(self) -> None:
        """Stop the job, on the server too. Rows that are complete stay readable. No effect once it is done."""
        ended = self.fail(JobCancelledError("the job was cancelled before these scores arrived"))
        if ended and self._on_cancel and os.getpid() == self._process:
            self._on_cancel()

    def put(self, rows: Positions, columns: Positions, block: NDArray[np.float32]) -> None:
        """Fill in scores that have arrived.

        Args:
            rows: Stored rows, a slice with both ends or distinct positions.
            columns: Stored columns, likewise.
            block: The scores, shape ``(rows, columns)``.

        Raises:
            ValueError: The block has another shape, or some score was there already.
        """
        if not isinstance(rows, slice):
            rows = np.asarray(rows)[:, None]
        with self._changed:
            if self._error is not None or block.size == 0:
                return
            target = self._scores[rows, columns]
            if target.shape != block.shape:
                raise ValueError(f"a block of shape {block.shape} for scores of shape {target.shape}")
            self._scores[rows, columns] = block
            flat = rows if isinstance(rows, slice) else rows[:, 0]
            missing = self._missing[flat] - block.shape[1]
            self._missing[flat] = missing
            fewest = missing.min(initial=1)
            if fewest < 0:
                raise ValueError("a block holds scores that were there already")
            if fewest == 0:
                self._rows_missing -= len(missing) - int(np.count_nonzero(missing))
                self._changed.notify_all()

    def fail(self, error: BaseException) -> bool:
        """End the job: whoever waits for missing scores gets ``error``. Returns False where it had ended before."""
        with self._changed:
            if self.done():
                return False
            self._error = error
            self._changed.notify_all()
            return True

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("scores that are still arriving cannot be viewed as an array without a copy")
        scores = self.result()
        return scores if dtype is None else scores.astype(dtype, copy=False)

    def __repr__(self) -> str:
        state = "complete" if self._rows_missing == 0 else f"{self._rows_missing} rows missing"
        failed = "" if self._error is None else f", {type(self._error).__name__}"
        return f"ScoreMatrix(shape={self.shape}, {state}{failed})"

    def _wait(self, complete: Callable[[], bool], timeout: float | None, what: str) -> None:
        if os.getpid() != self._process and not complete():
            # The thread that would have filled it does not exist here, and its lock may be held for ever.
            raise RerankerError(f"{what} of the scores belong to a job of the process that this one was forked from")
        with self._changed:
            if complete():
                return
            begun = time.monotonic()
            try:
                self._changed.wait_for(lambda: self._error is not None or complete(), timeout)
            finally:
                self.seconds_waited += time.monotonic() - begun
            if complete():
                return
            if self._error is not None:
                raise self._error
            raise RerankerTimeoutError(f"{what} of the scores did not arrive within {timeout} s")
