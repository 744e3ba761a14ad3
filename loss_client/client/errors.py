"""Errors of the client, and the translation of gRPC's errors into them."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS_KEY = "grpc-status-details-bin"
# A broken connection is mostly UNAVAILABLE. A server that ends a call at the end of its grace period gives CANCELLED;
# calls that this client cancels raise asyncio.CancelledError instead.
_LOST_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
# Resets by peers and proxies have one of these codes; only the message distinguishes them from other errors.
_RESET_CODES = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
_HINTS = {
    grpc.StatusCode.UNAUTHENTICATED: "the server accepts only callers with valid credentials: give them to the client",
    grpc.StatusCode.PERMISSION_DENIED: "the server does not allow this call with the client's credentials",
    grpc.StatusCode.UNIMPLEMENTED: "use a server of a contract version that has this method",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "send fewer or shorter texts in one message, or raise the server's limits",
}
# Codes that every later request would meet as well, whatever its texts are.
_PERMANENT_CODES = frozenset(
    {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED}
)
_RESET_MARKS = (
    "rst_stream",
    "goaway",
    "stream removed",
    "socket closed",
    "connection reset",
    "broken pipe",
    # Messages of gRPC's asyncio layer for a connection that was lost between two of its own operations.
    "internal error from core",
    'failed "execute_batch"',
)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One broken rule of a request.

    Attributes:
        field: Path of the field in the request message.
        description: The offending value and the rule.
    """

    field: str
    description: str


class RerankerError(Exception):
    """Base class of the client's errors."""


class RerankerUnavailableError(RerankerError):
    """No server could be reached, or the connection could not be kept, until the deadline.

    The message names the servers that were tried and the number of pairs without a score.
    """


class RerankerTimeoutError(RerankerError, TimeoutError):
    """A server was reached but did not answer in time, or scores did not arrive within a caller's timeout."""


class RerankerRequestError(RerankerError):
    """The server refused a request or failed to answer it; the same request would fail again.

    Attributes:
        code: The gRPC status code.
        message: The server's message.
        violations: The rules that the request broke, if the server named them.
    """

    def __init__(self, code: grpc.StatusCode, message: str, violations: tuple[FieldViolation, ...] = ()) -> None:
        super().__init__(code, message, violations)
        self.code = code
        self.message = message
        self.violations = violations

    def __str__(self) -> str:
        rules = [f"{violation.field}: {violation.description}" for violation in self.violations]
        missing = [f"\n  {rule}" for rule in rules if rule not in self.message]
        hint = f" ({_HINTS[self.code]})" if self.code in _HINTS else ""
        return f"{self.code.name}: {self.message}{hint}{''.join(missing)}"


class IncompatibleServerError(RerankerError):
    """The server has another version of the contract, or is no reranker service."""


class ModelChangedError(RerankerError):
    """Scores of a job or step are still missing, and all servers left have another model than its first scores."""


class ScoreError(RerankerError):
    """A server's answer holds the wrong number of scores, a score that is not finite, or scores for no request."""


class JobCancelledError(RerankerError):
    """The job was cancelled before these scores arrived."""


class ClientClosedError(RerankerError):
    """The client was closed before or during the call."""


class ConnectionLostError(RerankerError):
    """One attempt failed and another may succeed. The client handles this error; its callers never get it.

    Attributes:
        retry_seconds: Seconds after which the server asked for the next attempt; None if it named none.
    """

    def __init__(self, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class OtherModelError(ConnectionLostError):
    """An attempt reached a server with another model than the one that the scores have to come from."""


def is_permanent(error: BaseException) -> bool:
    """Whether every later request would meet the error as well: another contract, or a caller that is not allowed."""
    if isinstance(error, RerankerRequestError):
        return error.code in _PERMANENT_CODES
    return isinstance(error, IncompatibleServerError)


def from_status(status: status_pb2.Status) -> RerankerError:
    """Return the exception for a ``google.rpc.Status``; ``ConnectionLostError`` if another attempt may succeed."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    retry_seconds = _retry_seconds(code, status)
    if code is grpc.StatusCode.UNAVAILABLE or retry_seconds is not None:
        return ConnectionLostError(f"{code.name}: {status.message}", retry_seconds)
    return RerankerRequestError(code, status.message, _violations(status))


def from_rpc_error(error: aio.AioRpcError, server: str) -> RerankerError:
    """Return the exception for a failed call to ``server``; ``ConnectionLostError`` if another attempt may succeed."""
    code, message = error.code(), error.details() or ""
    status = _details(error)
    retry_seconds = _retry_seconds(code, status)
    reset = code in _RESET_CODES and any(mark in message.lower() for mark in _RESET_MARKS)
    if code in _LOST_CODES or reset or retry_seconds is not None:
        return ConnectionLostError(f"{server}: {code.name}: {message}", retry_seconds)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RerankerTimeoutError(f"{server} did not answer in time: {message}")
    return RerankerRequestError(code, message, _violations(status))


def _details(error: aio.AioRpcError) -> status_pb2.Status:
    """Return the status with the details of a failed call; an empty one if there are none that can be read."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break  # the code and the message are left
    return status_pb2.Status()


def _retry_seconds(code: grpc.StatusCode, status: status_pb2.Status) -> float | None:
    """Return the delay of a ``google.rpc.RetryInfo`` among the details of a full or unavailable server.

    Without it RESOURCE_EXHAUSTED is final, because gRPC uses the code for messages that are too large as well.
    """
    if code not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        return None
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            seconds: float = info.retry_delay.seconds + info.retry_delay.nanos / 1e9
            return max(seconds, 0.0)
    return None


def _violations(status: status_pb2.Status) -> tuple[FieldViolation, ...]:
    found = []
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            found += [FieldViolation(each.field, each.description) for each in bad_request.field_violations]
    return tuple(found)
