"""Attempts at endpoints: each is ended at its limits, and all of them are ended for a fork.

Everything here runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
from grpc import aio

from loss_client.client.credentials import TLS_CA
from loss_client.client.endpoints import Endpoint
from loss_client.client.errors import (
    ConnectionLostError,
    OtherModelError,
    RerankerError,
    RerankerRequestError,
    from_rpc_error,
)
from loss_client.client.patience import Patience

T = TypeVar("T")

# A limit that is noticed so late passed while this process itself stood still: what has arrived by then is read first.
_LATE_SECONDS = 0.5

Attempt = Callable[[Endpoint, Patience], Coroutine[Any, Any, T]]


class SuspendedError(RerankerError):
    """The attempt was ended for a fork and has to be repeated."""


class StalledError(RerankerError):
    """The attempt was ended at one of its limits."""


class Attempts:
    """The attempts that are being made now."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()

    async def wait_open(self) -> None:
        """Wait while attempts are suspended."""
        await self._open.wait()

    async def make(
        self, attempt: Attempt[T], endpoint: Endpoint, patience: Patience
    ) -> tuple[T, None] | tuple[None, RerankerError]:
        """Make one attempt, and end it at its limits; return (result, None) or (None, failure).

        A failure is one of:

        - ``StalledError``: a limit has passed, of the client or of the call's deadline.
        - ``SuspendedError``: ``suspend`` ended the attempt.
        - ``OtherModelError``: the server has another model than the needed one.
        - ``ConnectionLostError``: another attempt may succeed.
        - another ``RerankerError``, made of a gRPC error: another attempt would meet it again.

        Raises:
            Exception: The attempt's own error, such as a ``RerankerError`` that another attempt would meet again.
        """
        # No variable or exception may keep a reference to the attempt: gRPC would still be running at a fork.
        try:
            return await self._run(attempt, endpoint, patience), None
        except SuspendedError:
            failure: RerankerError = SuspendedError()
        except StalledError:
            failure = StalledError()
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                failure = StalledError()
            else:
                failure = _with_advice(from_rpc_error(error, str(endpoint.address)), endpoint)
        except OtherModelError as error:
            failure = OtherModelError(str(error))
        except ConnectionLostError as error:
            failure = ConnectionLostError(str(error), error.retry_seconds)
        return None, failure

    async def suspend(self) -> None:
        """End all attempts; ``resume`` lets them be repeated."""
        self._open.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            self._idle.clear()
            await self._idle.wait()

    def resume(self) -> None:
        """Allow attempts again after ``suspend``."""
        self._open.set()

    async def _run(self, attempt: Attempt[T], endpoint: Endpoint, patience: Patience) -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(attempt(endpoint, patience))
        self._tasks.add(task)
        endpoint.attempts += 1
        late = False
        try:
            while not task.done():
                remaining = patience.attempt_remaining()
                if remaining <= 0 and not late:
                    raise StalledError
                # Not longer than the stall limit, which may begin to count once the server is known to send progress.
                due = loop.time() + (_LATE_SECONDS if late else min(remaining, patience.stall_seconds))
                await asyncio.wait({task}, timeout=due - loop.time())
                late = not late and loop.time() - due > _LATE_SECONDS
            if task.cancelled():
                raise SuspendedError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            endpoint.attempts -= 1
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()
            del task  # breaks the circle of an exception, its traceback, this frame and the task


def _with_advice(failure: RerankerError, endpoint: Endpoint) -> RerankerError:
    """The same error; what to do is added to errors of tokens and certificates."""
    if isinstance(failure, RerankerRequestError) and failure.code is grpc.StatusCode.UNAUTHENTICATED:
        token = endpoint.credentials.token
        sent = "this client has no token" if token is None else f"this client sent {token.origin}"
        return RerankerRequestError(failure.code, f"{endpoint.address}: {failure.message} ({sent})", failure.violations)
    if isinstance(failure, ConnectionLostError) and "CERTIFICATE_VERIFY_FAILED" in str(failure):
        return ConnectionLostError(
            f"{failure} (the server's certificate is not signed by an authority that this client trusts, or is for "
            f"another name: give the authority's certificate as root_certificates or in {TLS_CA})"
        )
    return failure
