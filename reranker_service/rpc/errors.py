"""Errors of requests, and the translation of every error to a ``google.rpc.Status``.

Each error is raised where the fact is known. The servicer and the stream turn it into the status of a call, of one
request of a batch, or of one chunk. Status codes are decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from ..scoring import EngineFailedError, OverLongError, ScoringError, TooShortLimitError

# A status travels in headers, once as text and once in base64, and gRPC drops calls whose headers exceed 8 kB.
_MOST_CHARACTERS = 2000

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
        message: The message for the client.
    """

    def __init__(self, message: str, code: StatusCode = StatusCode.INTERNAL) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def to_status(self) -> status_pb2.Status:
        """Express the error as a status that a client can read."""
        return status_pb2.Status(code=self.code.value[0], message=self.message)


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
            detail.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(detail)
        return status


def _first(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """The first violations that a status has room for, at least one."""
    size = 0
    for number, violation in enumerate(violations):
        size += len(violation.field) + len(violation.description)
        if number and size > _MOST_CHARACTERS:
            return tuple(violations[:number])
    return tuple(violations)


def invalid(field: str, description: str) -> InvalidRequestError:
    """Make the error for a single broken rule."""
    return InvalidRequestError([Violation(field, description)])


def not_ready() -> RerankError:
    """Make the error for calls that arrive while the model is loading; a later call may succeed."""
    return RerankError("the model is still loading; try again soon", StatusCode.UNAVAILABLE)


def as_rerank_error(error: Exception) -> RerankError:
    """Translate any error to one with a status.

    An unforeseen error is logged with its traceback; the client sees only that there was one.
    """
    match error:
        case RerankError():
            return error
        case OverLongError():
            return invalid("options.over_long", str(error))
        case TooShortLimitError():
            return invalid("options.max_length", str(error))
        case EngineFailedError():
            return RerankError(str(error), StatusCode.UNAVAILABLE)
        case ScoringError():
            return RerankError(str(error))
    log.error("unforeseen error", exc_info=error)
    return RerankError("internal error; the server's log has the details")
