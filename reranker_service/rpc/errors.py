"""What can go wrong with a request, as typed errors, and their one translation into ``google.rpc.Status``.

Errors are raised where the fact is known. The RPC layer turns them into the status of a call, of one request of a
batch, or of one chunk; nothing else decides on status codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

# A status travels in headers, once as text and once in base64: gRPC drops calls whose headers exceed 8 kB.
_TOLD_CHARACTERS = 2000

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule of one field.

    Attributes:
        field: Path of the field in its request, such as ``requests[2].top_n``.
        description: The offending value and the rule it breaks.
    """

    field: str
    description: str


class RerankError(Exception):
    """A request that cannot be answered; ``code`` says whose fault it is."""

    code = StatusCode.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def to_status(self) -> status_pb2.Status:
        """Express the error as a status that a client can read."""
        return status_pb2.Status(code=self.code.value[0], message=self.message)


class InvalidRequestError(RerankError):
    """The request breaks the contract; sending it again is of no use."""

    code = StatusCode.INVALID_ARGUMENT

    def __init__(self, violations: Sequence[Violation]) -> None:
        told = _first(violations)
        parts = [f"{violation.field}: {violation.description}" for violation in told]
        if len(told) < len(violations):
            parts.append(f"and {len(violations) - len(told)} more")
        super().__init__("; ".join(parts))
        self.violations = told

    def to_status(self) -> status_pb2.Status:
        """Express the error as a status with one ``BadRequest`` detail."""
        status = super().to_status()
        detail = error_details_pb2.BadRequest()
        for violation in self.violations:
            detail.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(detail)
        return status


def _first(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """As many of the first violations as a status has room for, at least one."""
    size = 0
    for number, violation in enumerate(violations):
        size += len(violation.field) + len(violation.description)
        if number and size > _TOLD_CHARACTERS:
            return tuple(violations[:number])
    return tuple(violations)


class NotReadyError(RerankError):
    """The model is still loading; another try may succeed."""

    code = StatusCode.UNAVAILABLE


class EngineFailedError(RerankError):
    """The engine is dead; the process is about to end."""

    code = StatusCode.UNAVAILABLE


class ScoringError(RerankError):
    """The engine answered, but not with finite scores."""


def as_rerank_error(error: Exception) -> RerankError:
    """What a client is told of an error; an unforeseen one is logged in full and hidden behind a general message."""
    if isinstance(error, RerankError):
        return error
    log.error("unforeseen error", exc_info=error)
    return ScoringError("internal error; the server's log has the details")


def invalid(field: str, description: str) -> InvalidRequestError:
    """Make the error for a single broken rule."""
    return InvalidRequestError([Violation(field, description)])


def over_long(what: str, max_length: int) -> InvalidRequestError:
    """Make the error for input beyond the length limit where the options say to reject it."""
    return invalid(
        "options.over_long",
        f"{what}; the limit is {max_length} tokens: shorten the texts, raise max_length, or leave over_long at "
        "OVER_LONG_TRUNCATE",
    )
