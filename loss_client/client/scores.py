"""ScoreMatrix: scores that are still arriving, readable row by row as soon as a row is complete."""

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
from loss_client.former_names import former_attribute
from reranker.v1 import reranker_pb2

ScoreType = Literal["probability", "raw"]
"""Scale of the scores: probabilities in [0, 1], or the model's own numbers (logits; for a bi-encoder cosines)."""

RawScale = Literal["logit", "cosine"]
"""Number that a raw score is: the logit of a cross-encoder or causal reranker, or the cosine of a bi-encoder."""

Positions = slice | Sequence[int] | NDArray[np.integer[Any]]

# Scores of one block of rows. Blocks are allocated and freed one by one, so a whole matrix need not be in memory.
_BLOCK_SCORES = 1 << 16
# Rows that are checked together when looking for the first incomplete one.
_LOOK_AHEAD = 1 << 12


@dataclass(slots=True)
class ScoreUsage:
    """Counts of a job's pairs and tokens so far. Equal pairs count once.

    Attributes:
        pairs: Pairs whose scores have arrived.
        cached_pairs: Of these, pairs whose score the server had in its cache.
        client_cached_pairs: Of these, pairs whose score the client remembered from an earlier job.
        shared_pairs: Of these, pairs that got the score of an identical pair that the server was scoring.
        truncated_pairs: Of these, pairs that were truncated to the length limit.
        tokens: Tokens that the model read.
        reconnects: Streams that broke and were replaced by another.
        servers: Servers from which scores have arrived; 1 for all servers without streams.
    """

    pairs: int = 0
    cached_pairs: int = 0
    client_cached_pairs: int = 0
    shared_pairs: int = 0
    truncated_pairs: int = 0
    tokens: int = 0
    reconnects: int = 0
    servers: int = 0

    remembered_pairs = former_attribute("remembered_pairs", "client_cached_pairs")

    def add(self, usage: reranker_pb2.Usage) -> None:
        """Add the counts of one reply."""
        self.pairs += usage.pairs
        self.cached_pairs += usage.cached_pairs
        self.shared_pairs += usage.shared_pairs
        self.truncated_pairs += usage.truncated_pairs
        self.tokens += usage.tokens


class ScoreMatrix:
    """A matrix of scores, shape ``(Q, D)``, float32, that another thread fills block by block.

    Readers block only until the rows that they ask for are complete. Any number of threads may read. ``release`` frees
    the memory of rows that will not be read again.

    Args:
        shape: ``(Q, D)``: queries, documents.
        row_ids: For each of the Q rows the stored row that holds its scores; rows may share a stored row.
            Default: the stored row of the same number.
        column_ids: The same for the D columns.
        on_cancel: Called by ``cancel`` if scores are missing, once.
        on_wait: Called by each reader that has to wait, in the reader's thread.
        on_arrival: Called after scores have arrived, with the number of stored scores that are missing.

    Attributes:
        shape: ``(Q, D)``.
        wait_seconds: Seconds that readers were blocked, summed over all readers.
        usage: Counts of the scores that have arrived.
        begun: Time at which the job began, on the clock of ``time.monotonic``, in seconds.
    """

    seconds_waited = former_attribute("seconds_waited", "wait_seconds")

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        row_ids: NDArray[np.int64] | None = None,
        column_ids: NDArray[np.int64] | None = None,
        on_cancel: Callable[[], object] | None = None,
        on_wait: Callable[[], object] | None = None,
        on_arrival: Callable[[int], object] | None = None,
    ) -> None:
        self.shape = shape
        self.wait_seconds = 0.0
        self.usage = ScoreUsage()
        self.begun = time.monotonic()
        self._ended: float | None = None
        self._row_ids = row_ids
        self._column_ids = column_ids
        rows = shape[0] if row_ids is None else int(row_ids.max(initial=-1)) + 1
        columns = shape[1] if column_ids is None else int(column_ids.max(initial=-1)) + 1
        self._columns = columns
        self._height = max(1, _BLOCK_SCORES // max(columns, 1))  # rows of a block
        self._blocks: dict[int, NDArray[np.float32]] = {}  # by number; made when the first score of one arrives
        self._held = np.ones(rows, dtype=np.bool_)  # whether each stored row is still readable: not released
        self._missing = np.full(rows, columns, dtype=np.int64)  # number of scores that each stored row lacks
        self._rows_missing = rows if columns else 0
        self._error: BaseException | None = None
        self._scores_missing = rows * columns
        self._on_cancel = on_cancel
        self._on_wait = on_wait
        self._on_arrival = on_arrival
        self._changed = threading.Condition()
        self._process = os.getpid()

    def rows(self, begin: int, end: int, timeout: float | None = None) -> NDArray[np.float32]:
        """Wait until rows ``begin`` to ``end`` (excluded) are complete; return them, shape ``(end - begin, D)``.

        Args:
            begin: First row.
            end: One past the last row.
            timeout: Most seconds to wait. Default: until the job ends.

        Raises:
            IndexError: There are no such rows.
            RerankerTimeoutError: The rows were not complete in time.
            RerankerError: The job failed or was cancelled before these rows were complete.
        """
        if not 0 <= begin <= end <= self.shape[0]:
            raise IndexError(f"rows {begin} to {end} of a matrix with {self.shape[0]} rows")
        stored = np.arange(begin, end) if self._row_ids is None else self._row_ids[begin:end]
        complete = 0  # number of stored rows, from the first one on, that are known to be complete

        def all_complete() -> bool:
            # Runs after every reply, so rows found complete are not checked again.
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

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        """Wait a limited time for rows ``begin`` to ``end`` (excluded); return them as far as they have arrived.

        Args:
            begin: First row.
            end: One past the last row.
            timeout: Most seconds to wait; 0 returns at once.

        Returns:
            Shape ``(end - begin, D)``; NaN for a score that has not arrived, also because the job was cancelled.

        Raises:
            IndexError: There are no such rows, or they were released.
            RerankerError: The job failed before these rows were complete.
        """
        try:
            return self.rows(begin, end, timeout)
        except (RerankerTimeoutError, JobCancelledError):
            if self._error is not None and not isinstance(self._error, JobCancelledError):
                raise  # the job failed
        stored = np.arange(begin, end) if self._row_ids is None else self._row_ids[begin:end]
        with self._changed:
            block = self._read(stored)
        return block if self._column_ids is None else block[:, self._column_ids]

    def release(self, begin: int, end: int) -> None:
        """Free the memory of rows that will not be read again, and of the rows that share their scores.

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
        """The error that ended the job; ``None`` while it runs and once it is complete."""
        return self._error

    @property
    def span(self) -> tuple[float, float]:
        """Times at which the job began and ended, on the clock of ``time.monotonic``; now for a job that runs."""
        return self.begun, time.monotonic() if self._ended is None else self._ended

    def done(self) -> bool:
        """Whether the job has ended: all scores have arrived, or it failed or was cancelled."""
        return self._rows_missing == 0 or self._error is not None

    def cancel(self) -> None:
        """Stop the job, on the server too. Complete rows stay readable. No effect on a job that has ended."""
        ended = self.fail(JobCancelledError("the job was cancelled before these scores arrived"))
        if ended and self._on_cancel and os.getpid() == self._process:
            self._on_cancel()

    def put(self, rows: Positions, columns: slice, block: NDArray[np.float32]) -> None:
        """Store scores that have arrived.

        Args:
            rows: Stored rows, a slice with both ends or distinct positions.
            columns: Stored columns, a slice with both ends.
            block: The scores, shape ``(rows, columns)``.

        Raises:
            ValueError: The block has another shape, or a score has arrived before.
        """
        positions = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else np.asarray(rows)
        with self._changed:
            if self._error is not None or block.size == 0:
                return
            if block.shape != (len(positions), columns.stop - columns.start):
                wanted = (len(positions), columns.stop - columns.start)
                raise ValueError(f"the block has shape {block.shape}; it has to have {wanted}")
            for number, lines in self._by_block(positions):
                if number not in self._blocks:
                    height = min(self._height, len(self._missing) - number * self._height)
                    self._blocks[number] = np.full((height, self._columns), np.nan, dtype=np.float32)
                self._blocks[number][positions[lines] - number * self._height, columns] = block[lines]
            missing = self._missing[positions] - block.shape[1]
            self._missing[positions] = missing
            fewest = missing.min(initial=1)
            if fewest < 0:
                raise ValueError("the block holds scores that have arrived before")
            self._scores_missing -= block.size
            if fewest == 0:
                self._rows_missing -= len(missing) - int(np.count_nonzero(missing))
                if self._rows_missing == 0:
                    self._ended = time.monotonic()
                self._changed.notify_all()
        if self._on_arrival:
            self._on_arrival(self._scores_missing)

    def _read(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copy stored rows, because callers may write into the array that they get; NaN where no score has arrived."""
        found = np.empty((len(positions), self._columns), dtype=np.float32)
        if found.size:
            for number, lines in self._by_block(positions):
                block = self._blocks.get(number)
                found[lines] = np.nan if block is None else block[positions[lines] - number * self._height]
        return found

    def _by_block(self, positions: NDArray[np.integer[Any]]) -> Iterator[tuple[int, slice | NDArray[np.bool_]]]:
        """Yield (number of a block, selection of the positions that are in it)."""
        numbers = positions // self._height
        if (numbers == numbers[0]).all():
            yield int(numbers[0]), slice(0, len(positions))
            return
        for number in np.unique(numbers).tolist():
            yield number, numbers == number

    def fail(self, error: BaseException) -> bool:
        """End the job: readers of missing scores get ``error``. Returns False if the job had ended before."""
        with self._changed:
            if self.done():
                return False
            self._error = error
            self._ended = time.monotonic()
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
            # The thread that fills the matrix does not exist in a forked child, and the lock may stay locked for ever.
            raise RerankerError(
                f"{what} of the scores belong to a job of the parent process; a forked child cannot read them"
            )
        with self._changed:
            if complete():
                return
            begun = time.monotonic()
            if self._on_wait and self._error is None:
                self._on_wait()
            try:
                self._changed.wait_for(lambda: self._error is not None or complete(), timeout)
            finally:
                self.wait_seconds += time.monotonic() - begun
            if complete():
                return
            if self._error is not None:
                raise self._error
            raise RerankerTimeoutError(f"{what} of the scores did not arrive within {timeout} s")
