"""Channels to the servers of one client, with retries: at another server, after a backoff, until a deadline.

Everything here runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc

from loss_client.client.attempts import Attempt, Attempts, StalledError, SuspendedError
from loss_client.client.endpoints import ChannelSettings, Endpoint
from loss_client.client.errors import (
    ConnectionLostError,
    OtherModelError,
    RerankerError,
    RerankerRequestError,
    RerankerTimeoutError,
    RerankerUnavailableError,
)
from loss_client.client.names import Names
from loss_client.client.patience import Patience
from loss_client.client.queue import JobQueue
from loss_client.client.turns import ModelPin, Turns

if TYPE_CHECKING:
    from reranker.v1.reranker_pb2_grpc import RerankerServiceAsyncStub

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# Longest time that the first job of a client with several addresses waits until all of them have named their models.
_SURVEY_SECONDS = 2.0
# Time after which a job looks again for an endpoint that none of its streams uses.
_LOOK_SECONDS = 0.1


class Channels:
    """All endpoints of a client. Calls and jobs use them in turn, and a large job uses them at the same time.

    Attributes:
        turns: Chooses the endpoints, and knows their models.
        queue: Order in which jobs begin.
    """

    def __init__(self, settings: ChannelSettings) -> None:
        self._names = Names(settings)
        self._endpoints = self._names.endpoints
        self.turns = Turns(self._endpoints)
        self.queue = JobQueue()
        self._surveying = asyncio.Lock()
        self._surveyed = False
        self._attempts = Attempts()
        self._warned = False

    async def run(
        self,
        attempt: Attempt[T],
        patience: Patience,
        left: Callable[[], str] = lambda: "",
        pin: ModelPin | None = None,
        on_failure: Callable[[str], None] = lambda failure: None,
        busy: set[Endpoint] | None = None,
    ) -> T:
        """Make attempts, each at one endpoint, until one succeeds or fails for good.

        Args:
            attempt: Makes one attempt. ``ConnectionLostError`` and gRPC's errors for a lost connection lead to another
                attempt.
            patience: The deadline, and the limits of each attempt.
            left: Returns the end of the error message, such as the number of pairs that are left.
            pin: The model that is needed. Default: the client's.
            on_failure: Called with the error of each attempt that another one follows.
            busy: Endpoints of attempts that are made beside these ones, and are left to them; has the endpoint of the
                present attempt as well. Default: there are none.

        Raises:
            RerankerUnavailableError: All attempts failed until the deadline.
            RerankerTimeoutError: Servers were reached, but the attempts got no answer until the deadline.
            ModelChangedError: Only servers of other models are left.
            RerankerError: An attempt failed with an error that another attempt would meet again.
        """
        pin = ModelPin() if pin is None else pin
        busy = set() if busy is None else busy
        tried, last, lost = 0, "none was made", False
        others: Counter[Endpoint] = Counter()
        await self._names.ready()
        await self._survey(patience)
        while True:
            await self._attempts.wait_open()
            now = asyncio.get_running_loop().time()
            endpoint, delay = self.turns.choose(pin, others, now, busy)
            if busy and (endpoint is None or delay > 0):  # the attempts beside this one go on, and may end meanwhile
                await asyncio.sleep(min(delay, _LOOK_SECONDS) or _LOOK_SECONDS)
                continue
            assert endpoint is not None  # as none is busy
            if tried == 0 and delay > patience.remaining() / 2:
                delay = 0.0  # earlier failures were other calls': this one makes at least one attempt
            if delay > patience.remaining():
                raise self._exhausted(tried, lost, patience, last, left())
            if delay > 0:
                await asyncio.sleep(delay)
                continue
            tried += 1
            begun = patience.last_progress
            patience.begin_attempt(takeover=any(one is not endpoint for one in self.turns.usable(pin, others, now)))
            busy.add(endpoint)
            try:
                result, failure = await self._attempts.make(attempt, endpoint, patience)
            finally:
                busy.discard(endpoint)
            if failure is None:
                endpoint.succeeded()
                return cast("T", result)
            if isinstance(failure, SuspendedError):
                continue
            if isinstance(failure, OtherModelError):
                others[endpoint] += 1
                last = str(failure)
                continue
            if isinstance(failure, StalledError):
                failure = await self._stalled(endpoint, patience, begun, tried, left)
            if not isinstance(failure, ConnectionLostError):
                raise failure
            if patience.last_progress > begun:
                tried, lost = 1, False
                others.clear()  # they may have been replaced while this attempt scored pairs
            lost = lost or not isinstance(failure, _StallError)
            last = str(failure)
            on_failure(last)
            if not isinstance(failure, _StallError):
                _rest(endpoint, failure, patience)
            elif patience.remaining() <= 0:
                raise self._exhausted(tried, lost, patience, last, left())

    def look(self) -> bool:
        """Follow host names whose addresses change; returns whether there are, or may be, several servers."""
        self._names.look()
        return len(self._endpoints) > 1 or self._names.any

    @property
    def may_change(self) -> bool:
        """Whether servers may come and go."""
        return self._names.any

    async def help(self, attempt: Attempt[None], endpoint: Endpoint, patience: Patience) -> None:
        """Make one attempt at an endpoint beside those of ``run``; the endpoint rests if the attempt fails.

        Args:
            attempt: See ``run``.
            endpoint: The endpoint.
            patience: Limits of this attempt, from ``Patience.branch``.

        Raises:
            RerankerError: The attempt failed with an error that another attempt would meet again.
        """
        await self._attempts.wait_open()
        patience.begin_attempt(takeover=True)
        _, failure = await self._attempts.make(attempt, endpoint, patience)
        if failure is None:
            endpoint.succeeded()
        elif isinstance(failure, StalledError):
            await self._rest_after_stall(endpoint, patience)
        elif isinstance(failure, SuspendedError | OtherModelError):
            return
        elif isinstance(failure, ConnectionLostError):
            _rest(endpoint, failure, patience)
        else:
            raise failure

    async def call(
        self,
        rpc: Callable[[RerankerServiceAsyncStub], Any],
        request: Any,
        patience: Patience,
        read: Callable[[Any], T] = lambda response: response,
        pin: ModelPin | None = None,
        on_failure: Callable[[str], None] = lambda failure: None,
    ) -> T:
        """Make a unary call, with retries.

        Args:
            rpc: Picks the method of a stub.
            request: The request message.
            patience: The deadline.
            read: Turns the response into the result; ``ConnectionLostError`` leads to another attempt.
            pin: The model that is needed. Default: the client's.
            on_failure: Called with the error of each attempt that another one follows.
        """
        pin = ModelPin() if pin is None else pin

        async def attempt(endpoint: Endpoint, patience: Patience) -> T:
            stub = await endpoint.stub(patience.remaining())
            # The deadline goes to the server too, which then stops scoring when the client stops waiting.
            timeout = max(patience.attempt_remaining(), 0.001)
            response = await rpc(stub)(request, timeout=timeout, metadata=endpoint.metadata)
            if response.fingerprint:  # not set in ranked replies of contract 1.0
                self.turns.agree(pin, endpoint, response.fingerprint)
            return read(response)

        return await self.run(attempt, patience, pin=pin, on_failure=on_failure)

    def warn_of_fallback(self) -> None:
        """Warn, once in the life of a client, that the server has no streams."""
        if not self._warned:
            self._warned = True
            _logger.warning(
                "The server, or a proxy in front of it, has no RerankStream. It is replaced by RerankBatch, which "
                "is slower and sends every pair with its texts."
            )

    async def suspend(self) -> None:
        """End all attempts and close all channels, so that gRPC stops running; ``resume`` lets attempts be repeated."""
        await self._attempts.suspend()
        await self.close()

    def resume(self) -> None:
        """Allow attempts again after ``suspend``."""
        self._attempts.resume()

    async def close(self) -> None:
        """Close all channels."""
        await self._names.close()

    async def _survey(self, patience: Patience) -> None:
        """At the first use of several addresses, ask all of them at once for contract and model."""
        if self._surveyed:
            return
        async with self._surveying:
            if self._surveyed:
                return
            if len(self._endpoints) == 1:
                self._surveyed = True
                return
            await self._attempts.wait_open()
            seconds = min(_SURVEY_SECONDS, patience.seconds / 4)
            endpoints = list(self._endpoints)
            answers = await asyncio.gather(
                *(self._attempts.make(_introduce, endpoint, _one_attempt(seconds)) for endpoint in endpoints),
                return_exceptions=True,
            )
            failures = [answer[1] if isinstance(answer, tuple) else None for answer in answers]
            if any(isinstance(failure, SuspendedError) for failure in failures):
                return
            now = asyncio.get_running_loop().time()
            for endpoint, failure in zip(endpoints, failures, strict=True):
                if isinstance(failure, StalledError):
                    await endpoint.stalled(now, patience.stall_seconds)
                elif failure is not None:
                    endpoint.failed(now)
            self.turns.vote()
            self._surveyed = True

    async def _stalled(
        self, endpoint: Endpoint, patience: Patience, begun: float, tried: int, left: Callable[[], str]
    ) -> RerankerError:
        """Let an endpoint rest after an attempt that ended at a limit; return the attempt's failure.

        Args:
            endpoint: The endpoint.
            patience: The limits.
            begun: Time of the last progress before the attempt.
            tried: Number of attempts since then.
            left: Returns the end of the error message.
        """
        over = patience.remaining() <= 0
        only = over and (tried == 1 or patience.last_progress > begun)
        failure: RerankerError
        if only:  # the deadline passed in the first attempt since the last progress
            failure = RerankerTimeoutError(f"{endpoint.address} {patience.describe(patience.seconds)}{left()}")
        else:
            failure = _StallError(f"{endpoint.address} {patience.describe()}")
        await self._rest_after_stall(endpoint, patience)
        return failure

    @staticmethod
    async def _rest_after_stall(endpoint: Endpoint, patience: Patience) -> None:
        """Let the next job or call try another endpoint first."""
        now = asyncio.get_running_loop().time()
        await endpoint.stalled(now, min(patience.stall_seconds, patience.seconds))

    def _exhausted(self, tried: int, lost: bool, patience: Patience, last: str, left: str) -> RerankerError:
        """Return the error for a deadline that passed after several attempts.

        Args:
            tried: Number of attempts since the last progress.
            lost: Whether a connection was lost in one of them.
            patience: The deadline.
            last: The last error.
            left: The end of the message.
        """
        addresses = [str(endpoint.address) for endpoint in self._endpoints]
        kind = RerankerUnavailableError if lost or tried == 0 else RerankerTimeoutError
        return kind(
            f"no progress for {patience.seconds:g} s with {', '.join(addresses)}: {tried} attempts; "
            f"the last error: {last}{self.turns.left_out()}{left}"
        )


def _rest(endpoint: Endpoint, failure: ConnectionLostError, patience: Patience) -> None:
    """Let an endpoint rest after a failed attempt, as long as its server asks for or its failures make it."""
    now = asyncio.get_running_loop().time()
    if failure.retry_seconds is not None:
        endpoint.full(now, failure.retry_seconds)
        return
    if patience.finished:
        endpoint.succeeded()
    endpoint.failed(now)


class _StallError(ConnectionLostError):
    """An attempt that ended at a limit before the deadline: another one follows."""


async def _introduce(endpoint: Endpoint, patience: Patience) -> None:
    """Connect to an endpoint, and learn its contract and its model."""
    await endpoint.stub(patience.remaining())


def _one_attempt(seconds: float) -> Patience:
    return Patience(seconds, seconds)


def is_unimplemented(error: BaseException) -> bool:
    """Whether an error says that the server does not have the called method."""
    return isinstance(error, RerankerRequestError) and error.code is grpc.StatusCode.UNIMPLEMENTED
