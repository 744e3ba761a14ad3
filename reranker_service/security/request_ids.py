"""Request ids: a name for each call, in its log lines and in its trailing metadata."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc import aio
from structlog.contextvars import bind_contextvars, get_contextvars

KEY = "x-request-id"
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

Behavior = Callable[..., Any]


class RequestIds(aio.ServerInterceptor):
    """Gives each call an id: the client's ``x-request-id`` if it is well-formed, otherwise a new one.

    The id is bound to the log lines of the call as ``request_id``, and is the trailing metadata ``x-request-id`` of the
    call, whatever its status. Must be the first interceptor, so that refusals have it too.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See ``grpc.aio.ServerInterceptor``."""
        # gRPC runs interceptors and handler of a call in one task of its own: the binding ends with the call.
        bind_contextvars(request_id=_asked(handler_call_details) or uuid.uuid4().hex)
        handler = await continuation(handler_call_details)
        return handler and _with_trailer(handler)


def request_id() -> str:
    """The id of the call that is being answered; empty outside of calls."""
    return str(get_contextvars().get("request_id", ""))


def _asked(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == KEY and isinstance(value, str) and _WELL_FORMED.fullmatch(value):
            return value
    return None


def _with_trailer(handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """The same handler, with the id in the trailing metadata."""
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behavior = getattr(handler, kind)
    wrapped = _streaming(behavior) if handler.response_streaming else _single(behavior)
    make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    made: grpc.RpcMethodHandler[Any, Any] = make(wrapped, handler.request_deserializer, handler.response_serializer)
    return made


def _single(behavior: Behavior) -> Behavior:
    async def answer(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        _set_trailer(context)
        return await behavior(request, context)

    return answer


def _streaming(behavior: Behavior) -> Behavior:
    async def answer(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
        _set_trailer(context)
        replies = behavior(request, context)
        if not hasattr(replies, "__aiter__"):
            await replies
            return
        async with aclosing(replies):
            async for reply in replies:
                await context.write(reply)

    return answer


def _set_trailer(context: aio.ServicerContext[Any, Any]) -> None:
    context.set_trailing_metadata(((KEY, request_id()),))
