"""Errors of requests, and the translation of every error to a ``google.rpc.Status``.

Each error is raised where the fact is known. The servicer and the stream turn it into the status of a call, of one
request of a batch, or of one chunk. Status codes are decided here and nowhere else, and so are the sizes of messages. A
client sees the text of an error only if that text was written for clients. Of every other error it sees the name and an
id, under which the server's log has the whole error.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from ..scoring import EngineFailedError, OutOfMemoryError, OverLongError, ScoringError, TooShortLimitError

# A status travels in headers, once as text and once in base64, and gRPC drops calls whose headers exceed 8 kB.
_MOST_BYTES = 2000
_ID_ATTRIBUTE = "_id_in_log"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of one field.

    Attributes:
        field: Path of the field in its request, such as ``requests[2].top_n``.
        description: The offending value and the rule that it breaks.
    """

    field: str
    description: str


class RerankError(Exception):
    """An error with the status that a client sees.

    Attributes:
        code: The status code.
        message: The message for the client, cut to the size that a status has room for.
    """

    def __init__(self, message: str, code: StatusCode = StatusCode.INTERNAL) -> None:
        super().__init__(message)
        self.message = _cut(message)
        self.code = code

    def to_status(self) -> status_pb2.Status:
        """Express the error as a status that a client can read."""
        return status_pb2.Status(code=self.code.value[0], message=self.message)

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The trailing metadata that carries the status, with its details, of a failed call."""
        return (("grpc-status-details-bin", self.to_status().SerializeToString()),)


class InvalidRequestError(RerankError):
    """The request breaks the contract; the same request would fail again.

    Attributes:
        violations: The broken rules, as many as a status has room for.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        shown = _first(violations)
        parts = [f"{violation.field}: {violation.description}" for violation in shown]
        if len(shown) < len(violations):
            parts.append(f"and {len(violations) - len(shown)} more")
        super().__init__("; ".join(parts), StatusCode.INVALID_ARGUMENT)
        self.violations = shown

    def to_status(self) -> status_pb2.Status:
        """Express the error as a status with one ``BadRequest`` detail."""
        status = super().to_status()
        detail = error_details_pb2.BadRequest()
        for violation in self.violations:
            detail.field_violations.add(field=_cut(violation.field), description=_cut(violation.description))
        status.details.add().Pack(detail)
        return status


class BusyError(RerankError):
    """The server is full: a limit of all calls together is reached.

    Attributes:
        retry_seconds: Time after which the client may try again; ``None`` if the same call would fail again.
    """

    def __init__(self, message: str, retry_seconds: float | None = 1.0) -> None:
        super().__init__(message, StatusCode.RESOURCE_EXHAUSTED)
        self.retry_seconds = retry_seconds

    def to_status(self) -> status_pb2.Status:
        """Express the error as a status, with a ``RetryInfo`` detail if a later call may succeed."""
        status = super().to_status()
        if self.retry_seconds is not None:
            detail = error_details_pb2.RetryInfo()
            detail.retry_delay.FromNanoseconds(round(self.retry_seconds * 1e9))
            status.details.add().Pack(detail)
        return status


def _first(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """The first violations that a status has room for, at least one."""
    size = len("; and 1000000 more")
    for number, violation in enumerate(violations):
        size += _size(violation.field) + _size(violation.description) + len(": ; ")
        if number and size > _MOST_BYTES:
            return tuple(violations[:number])
    return tuple(violations)


def _size(text: str) -> int:
    """Bytes that a text takes in the header ``grpc-message``, which escapes all but printable ASCII as ``%XX``."""
    plain = sum(" " <= character <= "~" and character != "%" for character in text)
    return plain + 3 * (len(text.encode(errors="replace")) - plain)


def _cut(text: str) -> str:
    """Cut a text to the size that a status has room for, and replace what UTF-8 cannot express."""
    text = text.encode(errors="replace").decode()
    if len(text) * 12 <= _MOST_BYTES or _size(text) <= _MOST_BYTES:
        return text
    room = _MOST_BYTES - len("...")
    for end, character in enumerate(text):
        room -= _size(character)
        if room < 0:
            return text[:end] + "..."
    return text


def invalid(field: str, description: str) -> InvalidRequestError:
    """Make the error for a single broken rule."""
    return InvalidRequestError([Violation(field, description)])


def not_ready() -> RerankError:
    """Make the error for calls that arrive while the model is loading; a later call may succeed."""
    return RerankError("the model is still loading; try again soon", StatusCode.UNAVAILABLE)


def cancelled() -> RerankError:
    """Make the error of a chunk that the client has given up."""
    return RerankError("the client cancelled the chunk", StatusCode.CANCELLED)


def idle(seconds: float) -> RerankError:
    """Make the error that ends a stream on which nothing moves."""
    return RerankError(
        f"no message moved on the stream for {seconds:g} s, and nothing of it is being computed; open a stream when "
        "there is work and read its results, or raise --stream-idle-seconds",
        StatusCode.DEADLINE_EXCEEDED,
    )


def as_rerank_error(error: Exception) -> RerankError:
    """Translate any error to one with a status, without a traceback.

    The frames of a traceback hold the request, and the error is held by one of these frames: a cycle, which would keep
    a large request in memory until the garbage collector runs.
    """
    known = _translate(error)
    known.__traceback__ = known.__context__ = known.__cause__ = None
    return known


def _translate(error: Exception) -> RerankError:
    match error:
        case RerankError():
            return error
        case OverLongError():
            return invalid("options.over_long", str(error))
        case TooShortLimitError():
            return invalid("options.max_length", str(error))
        case EngineFailedError():
            return _unforeseen(error, "the engine has died", StatusCode.UNAVAILABLE)
        case OutOfMemoryError():
            # Without RetryInfo, which says that a later call may succeed: the same pair fails again.
            return RerankError(str(error), StatusCode.RESOURCE_EXHAUSTED)
        case ScoringError() if error.__cause__ is None:
            return RerankError(str(error))
        case ScoringError():
            return _unforeseen(error, "scoring failed")
    return _unforeseen(error, "internal error")


def _unforeseen(error: Exception, what: str, code: StatusCode = StatusCode.INTERNAL) -> RerankError:
    """Log an error with an id, and make the error that tells a client no more than its name and this id.

    An error that fails many calls is logged once, and has one id in all of them.
    """
    cause = error.__cause__ or error
    number = getattr(cause, _ID_ATTRIBUTE, None)
    if number is None:
        number = secrets.token_hex(4)
        with contextlib.suppress(AttributeError):  # of an exception with __slots__
            setattr(cause, _ID_ATTRIBUTE, number)
        log.error(what, id=number, exc_info=error)
    return RerankError(f"{what}: {type(cause).__name__}; the server's log has the details under id {number}", code)
