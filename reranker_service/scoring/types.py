"""Types of scoring: pairs, options, scores, and the counts and times of a reply."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..scheduling import JobResult

Role = Literal["query", "document"]
"""The part that a text plays in a pair; templates and prompts differ between the two."""


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """Options of scoring, with all defaults filled in.

    Attributes:
        instruction: The task in words; ``None`` for models that take no instruction.
        max_length: Length limit in tokens: of a pair, or for a bi-encoder of each text.
        raw: Whether scores are the model's own numbers; if false, they are probabilities in [0, 1].
        reject_over_long: Whether over-long input is an error; if false, it is truncated.
    """

    instruction: str | None
    max_length: int
    raw: bool
    reject_over_long: bool


@dataclass(frozen=True, slots=True)
class OptionRanges:
    """Options that the served model supports; lengths in tokens.

    Attributes:
        min_length: Smallest ``max_length`` that leaves room for a token of each text.
        max_length: Longest input that the model takes.
        default_length: Length limit of requests that set none.
        supports_instruction: Whether the model takes an instruction.
        default_instruction: Instruction of requests that give none; ``None`` for models that take none.
        has_probability: Whether a probability is defined for the model's scores; it is not for dot products.
    """

    min_length: int
    max_length: int
    default_length: int
    supports_instruction: bool
    default_instruction: str | None
    has_probability: bool = True

    @property
    def defaults(self) -> ScoringOptions:
        """Options of a request that sets none."""
        return ScoringOptions(self.default_instruction, self.default_length, raw=False, reject_over_long=False)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs over a text table: a grid or a list.

    Attributes:
        query_ids: Text ids, int64; shape ``(Q,)`` for a grid, ``(n,)`` for a list.
        document_ids: Text ids, int64; shape ``(D,)`` for a grid, ``(n,)`` for a list.
        grid: Whether every query is paired with every document, row-major; if false, position i with position i.
    """

    query_ids: NDArray[np.int64]
    document_ids: NDArray[np.int64]
    grid: bool

    def __len__(self) -> int:
        return len(self.query_ids) * (len(self.document_ids) if self.grid else 1)

    def flat(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Query ids and document ids pair by pair, each of shape ``(n,)``."""
        if not self.grid:
            return self.query_ids, self.document_ids
        return np.repeat(self.query_ids, len(self.document_ids)), np.tile(self.document_ids, len(self.query_ids))


@dataclass(slots=True)
class Usage:
    """Counts and times of one reply; the message ``reranker.v1.Usage`` has the same fields.

    Attributes:
        pairs: Scores in the reply.
        cached_pairs: Pairs whose score was known before.
        shared_pairs: Pairs that took the score of an identical pair.
        truncated_pairs: Pairs with a truncated text, among those scored for this reply.
        tokens: Tokens given to the model.
        queue_seconds: Time from the arrival of the pairs until the first of them entered the engine.
        engine_seconds: Time from the first pair's entering the engine until the last score.
    """

    pairs: int
    cached_pairs: int
    shared_pairs: int
    truncated_pairs: int
    tokens: int
    queue_seconds: float
    engine_seconds: float


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of some pairs, with their counts and times.

    Attributes:
        scores: float32, finite, shape ``(len(pairs),)``; a grid's are row-major.
        usage: Counts and times.
    """

    scores: NDArray[np.float32]
    usage: Usage


@dataclass(slots=True)
class Cost:
    """Counts that add up while one reply is made.

    Attributes:
        arrived: Time at which work on the reply began, ``time.monotonic()`` seconds.
        cached: Pairs whose score was known before.
        shared: Pairs that took the score of an identical pair.
        truncated: Pairs with a truncated text, among those scored for this reply.
        sequences: Sequences that the engine computed.
    """

    arrived: float = field(default_factory=time.monotonic)
    cached: int = 0
    shared: int = 0
    truncated: int = 0
    sequences: int = 0
    _started: float | None = None
    _tokens: int = 0

    def add(self, result: JobResult) -> None:
        """Count a job that has run."""
        self._tokens += result.tokens
        self.sequences += len(result.values)
        self._started = result.started if self._started is None else min(self._started, result.started)

    def usage(self, pairs: int) -> Usage:
        """Sum up for a reply of ``pairs`` scores that is finished now."""
        now = time.monotonic()
        started = now if self._started is None else self._started
        return Usage(
            pairs=pairs,
            cached_pairs=self.cached,
            shared_pairs=self.shared,
            truncated_pairs=self.truncated,
            tokens=self._tokens,
            queue_seconds=max(0.0, started - self.arrived),
            engine_seconds=now - started,
        )
