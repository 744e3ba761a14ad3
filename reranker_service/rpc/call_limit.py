"""Call limit: counts the scoring calls in flight, and refuses a call beyond the limit.

Health checks, reflection and GetModelInfo are never counted: an orchestrator would end a server that is merely busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from grpc import aio

from ..observing.metrics import Metrics
from .errors import BusyError


class CallLimit(aio.ServerInterceptor):
    """Limit of scoring calls in flight.

    A call counts from its headers to the end of its status, so that half-sent calls count too. A refused call's message
    is never read.

    Args:
        service: Full name of the service.
        rpcs: Names of the RPCs that count.
        most: Most calls in flight.
        metrics: Counts the refused calls.
    """

    def __init__(self, service: str, rpcs: Iterable[str], most: int, metrics: Metrics) -> None:
        self._refusals = {f"/{service}/{rpc}": self._refusal(rpc) for rpc in rpcs}
        self._most = most
        self._metrics = metrics
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Count the call, or give it a handler that refuses it."""
        refusal = self._refusals.get(handler_call_details.method)
        if refusal is None:
            return await continuation(handler_call_details)
        if self._in_flight >= self._most:
            return refusal
        self._in_flight += 1
        self._idle.clear()
        # gRPC runs interceptors and handler of a call in one task, which ends with the call.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._ended)
        return await continuation(handler_call_details)

    async def wait_idle(self) -> None:
        """Return once no scoring call is in flight."""
        await self._idle.wait()

    def _ended(self, _: asyncio.Task[Any]) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def _refusal(self, rpc: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: object, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            with self._metrics.call(rpc) as call:
                error = BusyError(
                    f"{self._most} calls are in flight, the server's limit (--max-concurrent-rpcs); try again later"
                )
                call.code = error.code.name
                trailers = (*(context.trailing_metadata() or ()), *error.metadata())
                await context.abort(error.code, error.message, trailers)
            # gRPC takes a handler of streams with a yield for an asynchronous generator.
            if False:
                yield b""

        # A handler of streams also serves unary calls, and is called before the message is read.
        return grpc.stream_stream_rpc_method_handler(refuse)
