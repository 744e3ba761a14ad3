"""Channels to the servers of one client, with retries: at another server, after a backoff, until a deadline.

Everything here runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc import aio

from loss_client.client.credentials import TLS_CA
from loss_client.client.endpoints import ChannelSettings, Endpoint
from loss_client.client.errors import (
    ConnectionLostError,
    OtherModelError,
    RerankerError,
    RerankerRequestError,
    RerankerTimeoutError,
    RerankerUnavailableError,
    from_rpc_error,
)
from loss_client.client.patience import Patience
from loss_client.client.queue import JobQueue
from loss_client.client.turns import ModelPin, Turns

if TYPE_CHECKING:
    from reranker.v1.reranker_pb2_grpc import RerankerServiceAsyncStub

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# Longest time that the first job of a client with several targets waits until all of them have named their models.
_SURVEY_SECONDS = 2.0
# A limit that is noticed so late passed while this process itself stood still: what has arrived by then is read first.
_LATE_SECONDS = 0.5


class _SuspendedError(Exception):
    """The attempt was ended for a fork and has to be repeated."""


class _StalledError(Exception):
    """The attempt was ended at one of its limits."""


Attempt = Callable[[Endpoint, Patience], Coroutine[Any, Any, T]]


class Channels:
    """All endpoints of a client, used in turn.

    Attributes:
        turns: Chooses the endpoints, and knows their models.
        queue: Order in which jobs begin.
    """

    def __init__(self, settings: ChannelSettings) -> None:
        self._endpoints = [Endpoint(target, settings) for target in settings.targets]
        self.turns = Turns(self._endpoints)
        self.queue = JobQueue()
        self._surveying = asyncio.Lock()
        self._surveyed = len(self._endpoints) == 1
        self._attempts: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._warned = False

    async def run(
        self,
        attempt: Attempt[T],
        patience: Patience,
        left: Callable[[], str] = lambda: "",
        pin: ModelPin | None = None,
        on_failure: Callable[[str], None] = lambda failure: None,
    ) -> T:
        """Make attempts, each at one endpoint, until one succeeds or fails for good.

        Args:
            attempt: Makes one attempt. ``ConnectionLostError`` and gRPC's errors for a lost connection lead to another
                attempt.
            patience: The deadline, and the limits of each attempt.
            left: Returns the end of the error message, such as the number of pairs that are left.
            pin: The model that is needed. Default: the client's.
            on_failure: Called with the error of each attempt that another one follows.

        Raises:
            RerankerUnavailableError: All attempts failed until the deadline.
            RerankerTimeoutError: Servers were reached, but the attempts got no answer until the deadline.
            ModelChangedError: Only servers of other models are left.
            RerankerError: An attempt failed with an error that another attempt would meet again.
        """
        pin = ModelPin() if pin is None else pin
        tried, last, lost = 0, "none was made", False
        others: Counter[Endpoint] = Counter()
        await self._survey(patience)
        while True:
            await self._open.wait()
            now = asyncio.get_running_loop().time()
            endpoint, delay = self.turns.choose(pin, others, now)
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
            failure: RerankerError | None = None  # None: the attempt ended at a limit
            # No variable or exception may keep a reference to the attempt: gRPC would still be running at a fork.
            try:
                result = await self._make(attempt, endpoint, patience)
            except _SuspendedError:
                continue
            except _StalledError:
                pass
            except aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    failure = _with_advice(from_rpc_error(error, str(endpoint.target)), endpoint)
            except OtherModelError as error:
                others[endpoint] += 1
                last = str(error)
                continue
            except ConnectionLostError as error:
                failure = ConnectionLostError(str(error), error.retry_seconds)
            else:
                endpoint.succeeded()
                return result
            if failure is None:
                failure = await self._stalled(endpoint, patience, begun, tried, left)
            if not isinstance(failure, ConnectionLostError):
                raise failure
            if patience.last_progress > begun:
                tried, lost = 1, False
                others.clear()  # they may have been replaced while this attempt scored pairs
            lost = lost or not isinstance(failure, _StallError)
            last = str(failure)
            on_failure(last)
            now = asyncio.get_running_loop().time()
            if failure.retry_seconds is not None:
                endpoint.full(now, failure.retry_seconds)
            elif not isinstance(failure, _StallError):
                if patience.last_progress > begun:
                    endpoint.succeeded()
                endpoint.failed(now)
            elif patience.remaining() <= 0:
                raise self._exhausted(tried, lost, patience, last, left())

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
        self._open.clear()
        for task in self._attempts:
            task.cancel()
        if self._attempts:
            self._idle.clear()
            await self._idle.wait()
        await self.close()

    def resume(self) -> None:
        """Allow attempts again after ``suspend``."""
        self._open.set()

    async def close(self) -> None:
        """Close all channels."""
        for endpoint in self._endpoints:
            await endpoint.close()

    async def _survey(self, patience: Patience) -> None:
        """At the first use of several targets, ask all of them at once for contract and model."""
        if self._surveyed:
            return
        async with self._surveying:
            if self._surveyed:
                return
            await self._open.wait()
            seconds = min(_SURVEY_SECONDS, patience.seconds / 4)
            answers = await asyncio.gather(
                *(self._make(_introduce, endpoint, _one_attempt(seconds)) for endpoint in self._endpoints),
                return_exceptions=True,
            )
            if any(isinstance(answer, _SuspendedError) for answer in answers):
                return
            now = asyncio.get_running_loop().time()
            for endpoint, answer in zip(self._endpoints, answers, strict=True):
                stalled = isinstance(answer, _StalledError)
                if isinstance(answer, aio.AioRpcError):
                    stalled = answer.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    if not stalled:
                        endpoint.failed(now)
                if stalled:
                    await endpoint.stalled(now, patience.stall_seconds)
            self.turns.vote()
            self._surveyed = True

    async def _make(self, attempt: Attempt[T], endpoint: Endpoint, patience: Patience) -> T:
        """Make one attempt, and end it at its limits.

        Raises:
            _StalledError: A limit has passed.
            _SuspendedError: ``suspend`` ended the attempt.
            Exception: The attempt's own error.
        """
        loop = asyncio.get_running_loop()
        task = loop.create_task(attempt(endpoint, patience))
        self._attempts.add(task)
        endpoint.attempts += 1
        late = False
        try:
            while not task.done():
                remaining = patience.attempt_remaining()
                if remaining <= 0 and not late:
                    raise _StalledError
                # Not longer than the stall limit, which may begin to count once the server is known to send progress.
                due = loop.time() + (_LATE_SECONDS if late else min(remaining, patience.stall_seconds))
                await asyncio.wait({task}, timeout=due - loop.time())
                late = not late and loop.time() - due > _LATE_SECONDS
            if task.cancelled():
                raise _SuspendedError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            endpoint.attempts -= 1
            self._attempts.discard(task)
            if not self._attempts:
                self._idle.set()
            del task  # breaks the circle of an exception, its traceback, this frame and the task

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
        now, over = asyncio.get_running_loop().time(), patience.remaining() <= 0
        only = over and (tried == 1 or patience.last_progress > begun)
        failure: RerankerError
        if only:  # the deadline passed in the first attempt since the last progress
            failure = RerankerTimeoutError(f"{endpoint.target} {patience.describe(patience.seconds)}{left()}")
        else:
            failure = _StallError(f"{endpoint.target} {patience.describe()}")
        # So that the next job or call tries another endpoint first.
        await endpoint.stalled(now, min(patience.stall_seconds, patience.seconds))
        return failure

    def _exhausted(self, tried: int, lost: bool, patience: Patience, last: str, left: str) -> RerankerError:
        """Return the error for a deadline that passed after several attempts.

        Args:
            tried: Number of attempts since the last progress.
            lost: Whether a connection was lost in one of them.
            patience: The deadline.
            last: The last error.
            left: The end of the message.
        """
        targets = [str(endpoint.target) for endpoint in self._endpoints]
        kind = RerankerUnavailableError if lost or tried == 0 else RerankerTimeoutError
        return kind(
            f"no progress for {patience.seconds:g} s with {', '.join(targets)}: {tried} attempts; "
            f"the last error: {last}{self.turns.left_out()}{left}"
        )


def _with_advice(failure: RerankerError, endpoint: Endpoint) -> RerankerError:
    """The same error; what to do is added to errors of tokens and certificates."""
    if isinstance(failure, RerankerRequestError) and failure.code is grpc.StatusCode.UNAUTHENTICATED:
        token = endpoint.credentials.token
        sent = "this client has no token" if token is None else f"this client sent {token.origin}"
        return RerankerRequestError(failure.code, f"{endpoint.target}: {failure.message} ({sent})", failure.violations)
    if isinstance(failure, ConnectionLostError) and "CERTIFICATE_VERIFY_FAILED" in str(failure):
        return ConnectionLostError(
            f"{failure} (the server's certificate is not signed by an authority that this client trusts, or is for "
            f"another name: give the authority's certificate as root_certificates or in {TLS_CA})"
        )
    return failure


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
