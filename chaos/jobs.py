"""Jobs: threads that have pairs of numbers scored, one job after the other, and check every score."""

from __future__ import annotations

import itertools
import threading
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from chaos.ledger import Ledger
from chaos.scores import Numbers, raw_scores, texts_of
from loss_client import RerankerClient, RerankerError

_CHUNK_PAIRS = 512
# Every so many jobs one lists its pairs, in place of a grid.
_LIST_EVERY = 4
_CALL_DOCUMENTS = 8
_CALL_SECONDS = 0.1
# Texts of no two jobs are equal, so that no cache answers.
_numbers = itertools.count(1)
_NUMBERS_A_JOB = 1 << 16


class Jobs:
    """Jobs that run for as long as the ``with`` block lasts; its end waits for the last ones.

    Args:
        client: Scores the pairs.
        ledger: Gets the counts.
        side: Queries of a job, and documents of a job.
        seed: The model that the scores have to come from.
        parallel: Threads.
        calls: Whether one more thread makes unary calls meanwhile.
    """

    def __init__(
        self, client: RerankerClient, ledger: Ledger, side: int, *, seed: int = 0, parallel: int = 2, calls: bool = True
    ) -> None:
        self._client, self._ledger, self._side, self._seed = client, ledger, side, seed
        self._ending = threading.Event()
        self._counter = itertools.count()
        works = [self._run_jobs] * parallel + [self._make_calls] * calls
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        if error is not None:
            self._client.close()
        for thread in self._threads:
            thread.join()

    def _run_jobs(self) -> None:
        while not self._ending.is_set():
            listed = next(self._counter) % _LIST_EVERY == _LIST_EVERY - 1
            run_job(self._client, self._ledger, self._side, self._seed, listed=listed)

    def _make_calls(self) -> None:
        while not self._ending.wait(_CALL_SECONDS):
            query, *documents = _new_numbers(1 + _CALL_DOCUMENTS)
            right = raw_scores(np.array([query]), np.array(documents), self._seed)
            found = np.full(_CALL_DOCUMENTS, np.nan, dtype=np.float32)
            try:
                texts = texts_of(np.array(documents))
                for ranked in self._client.rerank(texts_of(np.array([query]))[0], texts, score_type="raw"):
                    found[ranked.index] = ranked.score
            except RerankerError as error:
                self._ledger.error(error)
            self._ledger.call(found, right)


def run_job(client: RerankerClient, ledger: Ledger, side: int, seed: int = 0, *, listed: bool = False) -> None:
    """Run one job of ``side`` x ``side`` pairs, a grid or a list, and count its scores."""
    numbers = _new_numbers(2 * side)
    queries, documents = numbers[:side], numbers[side:]
    texts = texts_of(queries), texts_of(documents)
    right: NDArray[np.float32] = raw_scores(queries[:, None], documents[None, :], seed)
    if listed:
        rows, columns = (ids.ravel() for ids in np.indices((side, side)))
        right = right.reshape(-1, 1)
        matrix = client.stream_pairs(*texts, rows, columns, score_type="raw", chunk_pairs=_CHUNK_PAIRS)
    else:
        matrix = client.stream_grid(*texts, score_type="raw", chunk_pairs=_CHUNK_PAIRS)
    try:
        matrix.result()
    except RerankerError as error:
        ledger.error(error)
    except ValueError as error:  # scores that had arrived before
        ledger.error(error)
    ledger.job(matrix, right)


def _new_numbers(count: int) -> Numbers:
    begin = next(_numbers) * _NUMBERS_A_JOB % 10**9
    return np.arange(begin, begin + count)
