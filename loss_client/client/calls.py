"""Calls: the jobs and the unary calls of one client, run on its event loop for callers in other threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loss_client.client.background import Background
from loss_client.client.channels import Channels
from loss_client.client.endpoints import ChannelSettings
from loss_client.client.errors import ClientClosedError
from loss_client.client.job import Job, Pairs
from loss_client.client.memory import ScoreMemory
from loss_client.client.options import Priority, options_message, positive_seconds, priority_value
from loss_client.client.patience import Patience
from loss_client.client.queue import Place
from loss_client.client.run import run_job
from loss_client.client.scores import ScoreMatrix, ScoreType
from loss_client.client.turns import ModelPin

T = TypeVar("T")


class Calls:
    """Begins jobs and makes calls. Jobs that run hold a reference: thread and connections end with the last one.

    Args:
        settings: Addresses, metadata and credentials.
        timeout: Seconds of a call, and seconds that a job may go without finished work, unless they name their own.
        stall_timeout: Seconds of silence that end an attempt. None: the default of ``Patience``.
        memory: Scores that are remembered from earlier jobs.
    """

    def __init__(
        self, settings: ChannelSettings, timeout: float, stall_timeout: float | None, memory: ScoreMemory
    ) -> None:
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._memory = memory
        self.background = Background(settings)
        self.close = weakref.finalize(self, self.background.close)

    def begin(
        self,
        pairs: Pairs,
        usual_pairs: int,
        chunk_pairs: int | None,
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        score_type: ScoreType = "probability",
        priority: Priority = "bulk",
        timeout: float | None = None,
        recurring: bool = False,
        pin: ModelPin | None = None,
        step: int | None = None,
    ) -> ScoreMatrix:
        """Begin a job and return its scores, which are readable as they arrive.

        For arguments that are not described here see ``RerankerClient``.

        Args:
            pairs: The pairs to score.
            usual_pairs: Most pairs of a chunk, if neither ``chunk_pairs`` nor the server names a number.
            recurring: Whether the memory keeps these pairs in preference to others.
            pin: The model that the scores have to come from.
            step: Number of the training step that needs the scores; bulk jobs begin in the order of their steps. None:
                the job begins at once.

        Raises:
            ValueError: An option is out of range.
        """
        if chunk_pairs is not None and chunk_pairs < 1:
            raise ValueError(f"chunk_pairs is {chunk_pairs}; it has to be 1 or more")
        place = None
        if step is not None and priority == "bulk":
            place = Place(step, pairs.count, chunk_pairs or usual_pairs)
        matrix = ScoreMatrix(
            pairs.shape,
            row_ids=pairs.row_ids,
            column_ids=pairs.column_ids,
            on_cancel=lambda: future.cancel(),
            on_wait=None if place is None else place.want,
            on_arrival=None if place is None else place.arrived,
        )
        job = Job(
            pairs=pairs,
            matrix=matrix,
            options=options_message(instruction, max_length, score_type),
            priority=priority_value(priority),
            chunk_pairs=chunk_pairs,
            usual_pairs=usual_pairs,
            timeout=self._seconds(timeout),
            stall_timeout=self._stall_timeout,
            pin=ModelPin() if pin is None else pin,
            memory=self._memory,
            recurring=recurring,
            place=place,
        )
        future = self.background.submit(lambda channels: self._run(job, channels))
        return matrix

    async def _run(self, job: Job, channels: Channels) -> None:
        # A method, because the coroutine then holds a reference to this object, which must not end while jobs run.
        try:
            await run_job(job, channels)
        finally:
            channels.queue.end(job.place)

    @staticmethod
    def finish(matrix: ScoreMatrix) -> NDArray[np.float32]:
        """Wait for all scores of a job; cancel the job if the wait ends early.

        Raises:
            RerankerError: The job failed.
        """
        try:
            return matrix.result()
        except BaseException:  # an interrupt as well: the matrix has no other reader
            matrix.cancel()
            raise

    def call(
        self,
        rpc: Callable[[Any], Any],
        request: Any,
        timeout: float | None,
        read: Callable[[Any], T] = lambda response: response,
        pin: ModelPin | None = None,
    ) -> T:
        """Make a unary call, with further attempts while time is left, and return what ``read`` makes of the reply.

        Args:
            rpc: Returns the RPC of a stub.
            request: The request.
            timeout: Most seconds. None: the usual ones.
            read: Reads the reply.
            pin: The model that has to answer.

        Raises:
            RerankerError: The server could not be reached in time, refused the request, or sent a wrong answer.
        """
        seconds = self._seconds(timeout)

        async def work(channels: Channels) -> T:
            return await channels.call(rpc, request, Patience(seconds, self._stall_timeout), read, pin)

        return self.wait(work)

    def wait(
        self,
        work: Callable[[Channels], Coroutine[Any, Any, T]],
        report: Callable[[], None] | None = None,
        interval: float | None = None,
    ) -> T:
        """Run a coroutine and wait for its result.

        Args:
            work: Makes the coroutine.
            report: Called in this thread every ``interval`` seconds, while the coroutine runs.
            interval: See ``report``.

        Raises:
            ClientClosedError: The client was closed in the meantime.
        """
        future = self.background.submit(work)
        try:
            while report is not None and not concurrent.futures.wait([future], interval).done:
                report()
            return future.result()
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            raise ClientClosedError("the client was closed while it waited for an answer") from None
        except BaseException:
            future.cancel()
            raise

    def _seconds(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else positive_seconds("timeout", timeout)
