"""Standard services: health checks and reflection, which every client that can connect may call.

In grpcio's packages for both, gRPC parses the messages: it answers UNKNOWN, with a traceback in the log, to bytes that
are no message. Its health servicer also writes to a watcher while it holds a lock: one client that takes no data would
hold up every change of the status, and with it the shutdown. Messages are small here, and larger ones are refused: a
name of 8 MiB would be held as long as its watcher stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode, aio
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from .errors import RerankError, invalid

_MOST_BYTES = 4096

Request = TypeVar("Request", bound=Message)
Context = aio.ServicerContext[Any, Any]


def _parse(message: type[Request], data: bytes) -> Request:
    """Parse the bytes of a message. Raises ``RerankError``."""
    name = message.DESCRIPTOR.full_name
    if len(data) > _MOST_BYTES:
        raise invalid("message", f"a {name} of {len(data)} bytes is too large; the limit is {_MOST_BYTES}")
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise invalid("message", f"{len(data)} bytes are no {name}: {error}; strings must be UTF-8") from None


async def _abort(context: Context, error: RerankError) -> None:
    error.__traceback__ = None  # its frames hold the message
    trailers = (*(context.trailing_metadata() or ()), *error.metadata())
    await context.abort(error.code, error.message, trailing_metadata=trailers)


class Health:
    """The service ``grpc.health.v1.Health`` with the status of each service."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._final = False
        self._changed = asyncio.Event()

    async def set(self, service: str, status: int) -> None:
        """Set the status of a service; has no effect after ``enter_graceful_shutdown``."""
        if not self._final:
            self._statuses[service] = status
            self._tell()

    async def enter_graceful_shutdown(self) -> None:
        """Set the status of all services to NOT_SERVING for good."""
        self._final = True
        self._statuses = dict.fromkeys(self._statuses, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._tell()

    def handler(self) -> grpc.GenericRpcHandler:
        """The handlers for ``server.add_generic_rpc_handlers``."""
        return grpc.method_handlers_generic_handler(
            health.SERVICE_NAME,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    def _tell(self) -> None:
        """Wake all watchers."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _check(self, data: bytes, context: Context) -> bytes:
        try:
            service = _parse(health_pb2.HealthCheckRequest, data).service
            if service not in self._statuses:
                raise RerankError(f"there is no service {service!r}", StatusCode.NOT_FOUND)
        except RerankError as error:
            refusal = error
        else:
            return health_pb2.HealthCheckResponse(status=self._statuses[service]).SerializeToString()
        await _abort(context, refusal)
        raise AssertionError("a call goes on after its end")

    async def _watch(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            service = _parse(health_pb2.HealthCheckRequest, data).service
        except RerankError as error:
            refusal = error
        else:
            del data
            last = None
            while True:
                changed = self._changed
                status = self._statuses.get(service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status).SerializeToString()
                last = status
                await changed.wait()
        await _abort(context, refusal)


class Reflection:
    """The service ``grpc.reflection.v1alpha.ServerReflection``."""

    def __init__(self, services: Iterable[str]) -> None:
        """Describe services, given by full name."""
        self._servicer = reflection.aio.ReflectionServicer(service_names=services)

    def handler(self) -> grpc.GenericRpcHandler:
        """The handlers for ``server.add_generic_rpc_handlers``."""
        return grpc.method_handlers_generic_handler(
            reflection.SERVICE_NAME, {"ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._info)}
        )

    async def _info(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            async for data in messages:
                yield _parse(reflection_pb2.ServerReflectionRequest, data)

        try:
            # A generator, which its package declares as a coroutine.
            replies: Any = self._servicer.ServerReflectionInfo(requests(), context)
            async for reply in replies:
                yield reply.SerializeToString()
            return
        except RerankError as error:
            refusal = error
        await _abort(context, refusal)
