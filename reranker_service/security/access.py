"""Access: an interceptor that lets calls pass only with a token in force."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import grpc
import structlog
from grpc import aio
from structlog.contextvars import bind_contextvars

from .tokens import Tokens

_SEND_ONE = (
    "send it as metadata 'authorization: Bearer TOKEN'; RerankerClient takes it as token or token_file, or from "
    "RERANKER_CLIENT_TOKEN or RERANKER_CLIENT_TOKEN_FILE"
)
_NO_TOKEN = f"the call has no token: {_SEND_ONE}"
_NO_BEARER = f"the metadata 'authorization' must be one value, 'Bearer TOKEN': {_SEND_ONE}"
_WRONG_TOKEN = "the token is not in force on this server: it is mistyped, or was removed from the server's token file"
_LOG_SECONDS = 1.0

log = structlog.get_logger()


class Access(aio.ServerInterceptor):
    """Refuses calls without a token in force with UNAUTHENTICATED, before their messages are read.

    It refuses unknown methods too. The name of the token's client is bound to the log lines of the call, as ``client``.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        *,
        open_services: Collection[str],
        closed_services: Collection[str] = (),
        refused: Callable[[str], None] = lambda method: None,
    ) -> None:
        """Make the interceptor.

        Args:
            tokens: The tokens; ``None`` lets all calls pass.
            open_services: Full names of services that need no token.
            closed_services: Full names of services that are not served to calls without a token.
            refused: Called with the method of each refused call.
        """
        self._tokens = tokens
        self._open, self._closed = frozenset(open_services), frozenset(closed_services)
        self._refused = refused
        self._logged_at = -_LOG_SECONDS
        self._unlogged = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See ``grpc.aio.ServerInterceptor``."""
        service = handler_call_details.method[1:].partition("/")[0]
        if service not in self._open:
            reason = self._judge(service, handler_call_details)
            if reason is not None:
                return self._refusal(handler_call_details.method, *reason)
        return await continuation(handler_call_details)

    def _judge(self, service: str, details: grpc.HandlerCallDetails) -> tuple[grpc.StatusCode, str] | None:
        """Status and message for a call that must not pass, ``None`` for one that may."""
        if self._tokens is None:
            if service in self._closed:
                return grpc.StatusCode.UNIMPLEMENTED, f"{service} is not served here; --reflection serves it"
            return None
        values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if not values:
            return grpc.StatusCode.UNAUTHENTICATED, _NO_TOKEN
        scheme, _, token = values[0].partition(" ") if isinstance(values[0], str) else ("", "", "")
        if len(values) > 1 or scheme.lower() != "bearer" or not token:
            return grpc.StatusCode.UNAUTHENTICATED, _NO_BEARER
        client = self._tokens.find(token.strip())
        if client is None:
            return grpc.StatusCode.UNAUTHENTICATED, _WRONG_TOKEN
        bind_contextvars(client=client)
        return None

    def _refusal(self, method: str, code: grpc.StatusCode, reason: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: Any, context: aio.ServicerContext[Any, Any]) -> None:
            self._log(method, code, reason, context.peer())
            self._refused(method)
            await context.abort(code, reason)

        # A handler of streams: those of unary calls begin only when the client has sent its message, if ever.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _log(self, method: str, code: grpc.StatusCode, reason: str, peer: str) -> None:
        """Log a refusal; at most one a second, so that refused clients cannot fill the log."""
        now = time.monotonic()
        if now - self._logged_at < _LOG_SECONDS:
            self._unlogged += 1
            return
        log.warning("call refused", method=method, code=code.name, reason=reason, peer=peer, unlogged=self._unlogged)
        self._logged_at, self._unlogged = now, 0
