"""Options of the scoring methods: their types, their checks, and the messages that carry them."""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

from loss_client.client.scores import ScoreType
from reranker.v1 import reranker_pb2 as pb

Priority = Literal["bulk", "interactive"]
"""Urgency of a job or call: ``"interactive"`` overtakes ``"bulk"`` if a server has more work than it can do at once."""

_SCORE_TYPES = {"probability": pb.SCORE_TYPE_PROBABILITY, "raw": pb.SCORE_TYPE_RAW}
_PRIORITIES = {"bulk": pb.PRIORITY_BULK, "interactive": pb.PRIORITY_INTERACTIVE}


class JobOptions(TypedDict, total=False):
    """Options of a job, beside the size of its chunks; see ``RerankerClient`` for the meaning of each."""

    instruction: str | None
    max_length: int | None
    score_type: ScoreType
    priority: Priority
    timeout: float | None


def options_message(instruction: str | None, max_length: int | None, score_type: ScoreType) -> pb.RerankOptions:
    """Return the message with the scoring options.

    Raises:
        ValueError: ``max_length`` or ``score_type`` is out of range.
    """
    if score_type not in _SCORE_TYPES:
        raise ValueError(
            f"score_type is {score_type!r}; it has to be one of {', '.join(map(repr, get_args(ScoreType)))}"
        )
    return pb.RerankOptions(
        instruction=instruction, max_length=count("max_length", max_length), score_type=_SCORE_TYPES[score_type]
    )


def priority_value(priority: Priority) -> pb.Priority.ValueType:
    """Return the message's value for a priority.

    Raises:
        ValueError: There is no such priority.
    """
    if priority not in _PRIORITIES:
        raise ValueError(f"priority is {priority!r}; it has to be one of {', '.join(map(repr, _PRIORITIES))}")
    return _PRIORITIES[priority]


def count(name: str, value: int | None) -> int | None:
    """Return a value that an unsigned field of a message can hold.

    Raises:
        ValueError: The value is negative, or 2**32 or more. The server refuses what is beyond its own limits.
    """
    if value is not None and not 0 <= value < 2**32:
        raise ValueError(f"{name} is {value}; it has to be positive and less than 2**32")
    return value


def positive_seconds(name: str, seconds: float) -> float:
    """Return a number of seconds that is greater than 0.

    Raises:
        ValueError: It is not.
    """
    if not seconds > 0:
        raise ValueError(f"{name} is {seconds}; it has to be a positive number of seconds")
    return seconds
