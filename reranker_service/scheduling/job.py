"""Job: sequences that a client wants to have computed, and their results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..engines import TokenSequence


@dataclass(frozen=True, slots=True)
class Ticket:
    """Identity and priority of the call that work belongs to.

    Attributes:
        stream: The call. Calls of one priority share the engine fairly.
        interactive: Whether the work overtakes work that is not interactive.
    """

    stream: Hashable
    interactive: bool


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """Sequences to compute. They are made only when the engine has room for them.

    Attributes:
        ticket: The call that the job belongs to.
        lengths: Tokens of each sequence, int64, shape ``(n,)``.
        make: Gives the sequences at some positions, shape ``(k,)``. Reading one may make it.
    """

    ticket: Ticket
    lengths: NDArray[np.int64]
    make: Callable[[NDArray[np.intp]], Sequence[TokenSequence]]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class JobResult:
    """Results of a job.

    Attributes:
        values: The engine's results in the order of the job's positions, shape ``(n, ...)``.
        started: Time at which the first sequence entered the engine, ``time.monotonic()`` seconds.
        tokens: Tokens of all its sequences.
    """

    values: NDArray[np.float32]
    started: float
    tokens: int
