"""Preselection: the preselected pairs of one batch, chosen in the background and then scored by one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loss_client.client.errors import JobCancelledError
from loss_client.client.scores import ScoreUsage
from loss_client.filter.jobs import AskForPairs, ScoreRows
from loss_client.filter.nearest.cancellation import Cancellation
from loss_client.filter.nearest.choice import Choice
from loss_client.filter.nearest.worker import Worker
from loss_client.filter.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Preselected:
    """The preselected pairs of one batch, with the scores that have arrived.

    Attributes:
        choice: The pairs.
        scores: The score of each pair, NaN where none has arrived, shape ``(pairs,)``.
    """

    choice: Choice
    scores: NDArray[np.float32]

    def codes(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.int64]:
        """Return the code of each pair in a grid, ``query * documents + document``, shape ``(pairs,)``.

        Args:
            queries: The distinct queries of the grid; the pairs' queries are among them.
            documents: The distinct documents of the grid, likewise.
        """
        rows, columns = ({text: place for place, text in enumerate(texts)} for texts in (queries, documents))
        query_of = np.array([rows[text] for text in self.choice.queries], dtype=np.int64)
        document_of = np.array([columns[text] for text in self.choice.documents], dtype=np.int64)
        return query_of[self.choice.query_ids] * len(documents) + document_of[self.choice.document_ids]


class Preselection:
    """Chooses pairs in a background thread and has them scored. Implements ``ScoreRows``: an empty job at first.

    Args:
        worker: Runs the choice.
        choose: Chooses the pairs; runs in the background thread.
        ask: Begins the scoring job.
        patient: Whether the loss waits for the choice and the scores. Otherwise it uses those that have arrived.

    Attributes:
        ahead: Seconds between the request for the scores and their use; ``None`` without either.
        late: Whether the pairs had not been chosen when the loss stopped waiting for them.
    """

    def __init__(
        self, worker: Worker, choose: Callable[[Cancellation], Choice], ask: AskForPairs, patient: bool
    ) -> None:
        self.ahead: float | None = None
        self.late = False
        self._choose = choose
        self._ask = ask
        self._patient = patient
        self._waited = 0.0
        self._cancellation = Cancellation()
        self._job: ScoreRows | None = None
        self._begun = time.monotonic()
        self._future: Future[Choice] = worker.submit(self._run)

    def _run(self) -> Choice:
        choice = self._choose(self._cancellation)
        if len(choice.query_ids):
            queries, query_ids = np.unique(choice.query_ids, return_inverse=True)
            documents, document_ids = np.unique(choice.document_ids, return_inverse=True)
            bands = choice.bands()
            self._begun = time.monotonic()
            self._job = self._cancellation.begin(
                lambda: self._ask(
                    [choice.queries[query] for query in queries],
                    [choice.documents[document] for document in documents],
                    query_ids.reshape(-1),
                    document_ids.reshape(-1),
                    recurring=False,
                    bands=bands,
                )
            )
        return choice

    def read(self, waiting: Waiting) -> Preselected | None:
        """Wait for the choice and the scores, and cancel what is late; ``None`` if the choice is.

        Args:
            waiting: Limits the time.

        Raises:
            RerankerError: The choice or the job failed.
        """
        limit = waiting if self._patient else Waiting(0.0)
        begun = time.monotonic()
        try:
            choice = self._future.result(limit.left)
        except FutureTimeoutError:
            if self._future.done():
                raise  # the choice failed with an error of this class
            self.late = True
            self.cancel()
            return None
        finally:
            waited = time.monotonic() - begun
            self._waited += waited
            limit.spend(waited)
        job = self._job
        if job is None:
            return Preselected(choice, np.empty(0, dtype=np.float32))
        self.ahead = time.monotonic() - self._begun
        scores = limit.rows(job, 0, len(choice.query_ids))[:, 0]
        if limit is not waiting:
            waiting.late_pairs += limit.late_pairs
        job.release(0, len(scores))
        return Preselected(choice, scores)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of pairs, and 1."""
        return (0, 1) if self._job is None else self._job.shape

    @property
    def wait_seconds(self) -> float:
        """Seconds that the loss has waited for the choice and the scores."""
        return self._waited + (0.0 if self._job is None else self._job.wait_seconds)

    @property
    def usage(self) -> ScoreUsage:
        """Counts of the scores that have arrived."""
        return ScoreUsage() if self._job is None else self._job.usage

    @property
    def error(self) -> BaseException | None:
        """The error that ended the choice or the job."""
        if self._future.cancelled():
            return JobCancelledError("the choice of pairs was cancelled before it began")
        error = self._future.exception() if self._future.done() else None
        return self._job.error if error is None and self._job is not None else error

    @property
    def span(self) -> tuple[float, float]:
        """Times at which the job began and ended; of no length without a job."""
        return (self._begun, self._begun) if self._job is None else self._job.span

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Wait for the scores of some pairs, shape ``(end - begin, 1)``."""
        self._future.result()
        assert self._job is not None
        return self._job.rows(begin, end)

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        """Wait at most ``timeout`` seconds for the scores of some pairs; see ``ScoreRows``."""
        assert self._job is not None
        return self._job.arrived(begin, end, timeout)

    def release(self, begin: int, end: int) -> None:
        """Free the memory of pairs that will not be read again."""
        if self._job is not None:
            self._job.release(begin, end)

    def cancel(self) -> None:
        """Cancel the choice and the job."""
        self._future.cancel()
        self._cancellation.cancel()
