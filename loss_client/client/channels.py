"""Channels to the servers of one client, with retries: at another server, after a backoff, until a deadline.

Everything here runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc import aio

from loss_client.client.credentials import TLS_CA
from loss_client.client.endpoints import ChannelSettings, Endpoint
from loss_client.client.errors import (
    ConnectionLostError,
    RerankerError,
    RerankerRequestError,
    RerankerTimeoutError,
    RerankerUnavailableError,
    from_rpc_error,
)

if TYPE_CHECKING:
    from reranker.v1.reranker_pb2_grpc import RerankerServiceAsyncStub

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Patience:
    """Deadline of a call or job that each progress extends: at most ``seconds`` may pass without progress."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last_progress = asyncio.get_running_loop().time()

    def progress(self) -> None:
        """Extend the deadline: an answer arrived."""
        self.last_progress = asyncio.get_running_loop().time()

    def remaining(self) -> float:
        """Seconds until the deadline; 0 or less once it has passed."""
        return self.last_progress + self.seconds - asyncio.get_running_loop().time()


class _SuspendedError(Exception):
    """The attempt was ended for a fork and has to be repeated."""


class _StalledError(Exception):
    """The attempt was ended at the deadline."""


Attempt = Callable[[Endpoint, Patience], Coroutine[Any, Any, T]]


class Channels:
    """All endpoints of a client, used in turn."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._endpoints = [Endpoint(target, settings) for target in settings.targets]
        self._next = random.randrange(len(self._endpoints))  # so that many clients with one list spread over it
        self._attempts: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._warned = False

    async def run(self, attempt: Attempt[T], patience: Patience, left: Callable[[], str] = lambda: "") -> T:
        """Make attempts, each at one endpoint, until one succeeds or fails for good.

        Args:
            attempt: Makes one attempt. ``ConnectionLostError`` and gRPC's errors for a lost connection lead to another
                attempt.
            patience: The deadline.
            left: Returns the end of the error message, such as the number of pairs that are left.

        Raises:
            RerankerUnavailableError: All attempts failed until the deadline.
            RerankerTimeoutError: The last attempt got no answer until the deadline.
            RerankerError: An attempt failed with an error that another attempt would meet again.
        """
        tried, last = 0, "none was made"
        while True:
            await self._open.wait()
            endpoint, delay = self._choose()
            if tried == 0 and delay > patience.remaining() / 2:
                delay = 0.0  # earlier failures were other calls': this one makes at least one attempt
            if delay > patience.remaining():
                raise self._unavailable(tried, patience, last, left())
            if delay > 0:
                await asyncio.sleep(delay)
                continue
            tried += 1
            begun = patience.last_progress
            failure: RerankerError
            # No variable or exception may keep a reference to the attempt: gRPC would still be running at a fork.
            try:
                result = await self._make(attempt, endpoint, patience)
            except _SuspendedError:
                continue
            except _StalledError:
                # So that the next job or call tries another endpoint first.
                endpoint.failed(asyncio.get_running_loop().time())
                stalled = f"{endpoint.target} sent nothing for {patience.seconds:g} s"
                if tried == 1 or patience.last_progress > begun:
                    failure = RerankerTimeoutError(f"{stalled}{left()}")
                else:
                    failure = self._unavailable(tried, patience, stalled, left())
            except aio.AioRpcError as error:
                failure = _with_advice(from_rpc_error(error, str(endpoint.target)), endpoint)
            except ConnectionLostError as error:
                failure = ConnectionLostError(str(error))
            else:
                endpoint.succeeded()
                return result
            if not isinstance(failure, ConnectionLostError):
                raise failure
            if patience.last_progress > begun:
                endpoint.succeeded()
                tried = 1
            last = str(failure)
            endpoint.failed(asyncio.get_running_loop().time())

    async def call(
        self,
        rpc: Callable[[RerankerServiceAsyncStub], Any],
        request: Any,
        patience: Patience,
        read: Callable[[Any], T] = lambda response: response,
    ) -> T:
        """Make a unary call, with retries.

        Args:
            rpc: Picks the method of a stub.
            request: The request message.
            patience: The deadline.
            read: Turns the response into the result; ``ConnectionLostError`` leads to another attempt.
        """

        async def attempt(endpoint: Endpoint, patience: Patience) -> T:
            stub = await endpoint.stub(patience.remaining())
            # The deadline goes to the server too, which then stops scoring when the client stops waiting.
            timeout = max(patience.remaining(), 0.001)
            return read(await rpc(stub)(request, timeout=timeout, metadata=endpoint.metadata))

        return await self.run(attempt, patience)

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

    async def _make(self, attempt: Attempt[T], endpoint: Endpoint, patience: Patience) -> T:
        """Make one attempt, and end it at the deadline.

        Raises:
            _StalledError: The deadline passed.
            _SuspendedError: ``suspend`` ended the attempt.
            Exception: The attempt's own error.
        """
        task = asyncio.get_running_loop().create_task(attempt(endpoint, patience))
        self._attempts.add(task)
        try:
            while not task.done():
                remaining = patience.remaining()
                if remaining <= 0:
                    raise _StalledError
                await asyncio.wait({task}, timeout=remaining)
            if task.cancelled():
                raise _SuspendedError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            self._attempts.discard(task)
            if not self._attempts:
                self._idle.set()
            del task  # breaks the circle of an exception, its traceback, this frame and the task

    def _choose(self) -> tuple[Endpoint, float]:
        """Return (endpoint, seconds until it is ready): the next in turn that is ready, or the first that will be."""
        now = asyncio.get_running_loop().time()
        count = len(self._endpoints)
        for step in range(count):
            endpoint = self._endpoints[(self._next + step) % count]
            if endpoint.ready_at <= now:
                self._next = (self._next + step + 1) % count
                return endpoint, 0.0
        first = min(self._endpoints, key=lambda endpoint: endpoint.ready_at)
        return first, first.ready_at - now

    def _unavailable(self, tried: int, patience: Patience, last: str, left: str) -> RerankerUnavailableError:
        targets = [str(endpoint.target) for endpoint in self._endpoints]
        return RerankerUnavailableError(
            f"no progress for {patience.seconds:g} s with {', '.join(targets)}: {tried} attempts; "
            f"the last error: {last}{left}"
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


def is_unimplemented(error: BaseException) -> bool:
    """Whether an error says that the server does not have the called method."""
    return isinstance(error, RerankerRequestError) and error.code is grpc.StatusCode.UNIMPLEMENTED
