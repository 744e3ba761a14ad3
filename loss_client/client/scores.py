"""Scores that are still arriving: a matrix whose rows can be read as soon as they are complete."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loss_client.client.errors import JobCancelledError, RerankerError, RerankerTimeoutError
from reranker.v1 import reranker_pb2

ScoreType = Literal["probability", "raw"]
"""How scores are expressed: a number in [0, 1], or the model's own (a logit; for a bi-encoder the cosine)."""

Positions = slice | Sequence[int] | NDArray[np.integer[Any]]

# Scores of one block of rows: rows are given back in blocks, so that a matrix need never be in memory as a whole.
_BLOCK_SCORES = 1 << 16
# Rows that are looked at together for the first one that is not complete.
_LOOK_AHEAD = 1 << 12


@dataclass(slots=True)
class ScoreUsage:
    """What a job's scores have cost so far. Pairs are counted after equal ones were made one.

    Attributes:
        pairs: Pairs whose scores have arrived.
        cached_pairs: Of these, pairs whose score the server had in its cache.
        remembered_pairs: Of these, pairs whose score the client had from an earlier job; the server was not asked.
        shared_pairs: Of these, pairs that shared the score of an identical pair in the server.
        truncated_pairs: Of these, pairs with a text that was cut to fit the length limit.
        tokens: Tokens given to the model.
        reconnects: Streams that were lost and begun again.
    """

    pairs: int = 0
    cached_pairs: int = 0
    remembered_pairs: int = 0
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

    Readers block until the rows that they ask for are complete, and no longer. Any number of threads may read. Rows
    that nobody needs any more can be given back with ``release``.

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
        self._columns = columns
        self._height = max(1, _BLOCK_SCORES // max(columns, 1))  # rows of a block
        self._blocks: dict[int, NDArray[np.float32]] = {}  # by number; made when the first score of one arrives
        self._held = np.ones(rows, dtype=np.bool_)  # stored rows that have not been released
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
        stored = np.arange(begin, end) if self._row_ids is None else self._row_ids[begin:end]
        complete = 0  # of the stored rows, from the first on

        def all_complete() -> bool:
            # Asked after every reply: what was complete once is not looked at again.
            nonlocal complete
            while complete < len(stored):
                missing = self._missing[stored[complete : complete + _LOOK_AHEAD]] != 0
                if missing.any():
                    complete += int(missing.argmax())
                    return False
                complete += len(missing)
            return True

        self._wait(all_complete, timeout, f"rows {begin} to {end}")
        with self._changed:
            if not self._held[stored].all():
                raise IndexError(f"rows {begin} to {end} of the scores were released")
            block = self._read(stored)
        return block if self._column_ids is None else block[:, self._column_ids]

    def release(self, begin: int, end: int) -> None:
        """Give back rows that nobody will read again, and with them those that share their scores.

        Args:
            begin: First row.
            end: One past the last row.
        """
        with self._changed:
            stored = np.unique(np.arange(begin, end) if self._row_ids is None else self._row_ids[begin:end])
            self._held[stored] = False
            for number in np.unique(stored // self._height).tolist():
                if not self._held[number * self._height : (number + 1) * self._height].any():
                    self._blocks.pop(number, None)

    def result(self, timeout: float | None = None) -> NDArray[np.float32]:
        """Return the whole matrix, shape ``(Q, D)``, once it is complete. Raises what ``rows`` raises."""
        return self.rows(0, self.shape[0], timeout)

    @property
    def error(self) -> BaseException | None:
        """Why the missing scores will not arrive; ``None`` while they may, or if none is missing."""
        return self._error

    def done(self) -> bool:
        """Whether nothing more will arrive: all scores are there, or the job failed or was cancelled."""
        return self._rows_missing == 0 or self._error is not None

    def cancel(self) -> None:
        """Stop the job, on the server too. Rows that are complete stay readable. No effect once it is done."""
        ended = self.fail(JobCancelledError("the job was cancelled before these scores arrived"))
        if ended and self._on_cancel and os.getpid() == self._process:
            self._on_cancel()

    def put(self, rows: Positions, columns: slice, block: NDArray[np.float32]) -> None:
        """Fill in scores that have arrived.

        Args:
            rows: Stored rows, a slice with both ends or distinct positions.
            columns: Stored columns, a slice with both ends.
            block: The scores, shape ``(rows, columns)``.

        Raises:
            ValueError: The block has another shape, or some score was there already.
        """
        positions = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else np.asarray(rows)
        with self._changed:
            if self._error is not None or block.size == 0:
                return
            if block.shape != (len(positions), columns.stop - columns.start):
                wanted = (len(positions), columns.stop - columns.start)
                raise ValueError(f"a block of shape {block.shape} for scores of shape {wanted}")
            for number, lines in self._by_block(positions):
                if number not in self._blocks:
                    height = min(self._height, len(self._missing) - number * self._height)
                    self._blocks[number] = np.empty((height, self._columns), dtype=np.float32)
                self._blocks[number][positions[lines] - number * self._height, columns] = block[lines]
            missing = self._missing[positions] - block.shape[1]
            self._missing[positions] = missing
            fewest = missing.min(initial=1)
            if fewest < 0:
                raise ValueError("a block holds scores that were there already")
            if fewest == 0:
                self._rows_missing -= len(missing) - int(np.count_nonzero(missing))
                self._changed.notify_all()

    def _read(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of stored rows that are complete: callers may write into what they get."""
        found = np.empty((len(positions), self._columns), dtype=np.float32)
        if found.size:
            for number, lines in self._by_block(positions):
                found[lines] = self._blocks[number][positions[lines] - number * self._height]
        return found

    def _by_block(self, positions: NDArray[np.integer[Any]]) -> Iterator[tuple[int, slice | NDArray[np.bool_]]]:
        """The numbers of the blocks that hold some rows, each with which of the rows it holds."""
        numbers = positions // self._height
        if (numbers == numbers[0]).all():
            yield int(numbers[0]), slice(0, len(positions))
            return
        for number in np.unique(numbers).tolist():
            yield number, numbers == number

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
