"""Engine: the protocol of a program that computes one number or one vector for each token sequence.

An engine does not know texts, templates, caches or clients. The scheduler decides which sequences come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models import TokenSequence


class EngineDeadError(RuntimeError):
    """The engine can no longer answer; the process has to end."""


class Engine(Protocol):
    """Computes raw scores or embeddings.

    Attributes:
        name: ``"torch"`` or ``"vllm"``.
        dtype: Number format of the computation, such as ``"float32"``.
        max_in_flight: Number of sequences in flight that keep the engine busy; more would only wait inside it. An
            engine that pads is given two batches instead, whatever their size.
        max_batch: Most sequences of one call of ``run``.
        step_tokens: Tokens that an engine without padding computes in one step; ``None`` if it has no such limit. The
            scheduler gives the engine a few steps' tokens at a time, and no more than ``max_in_flight`` sequences.
        versions: Distribution name to version of the libraries that compute.
        scoring_args: Arguments of the engine, by name, that may change scores.
        overtakes: Whether urgent sequences overtake others that wait inside the engine.
    """

    name: str
    dtype: str
    max_in_flight: int
    max_batch: int
    step_tokens: int | None
    versions: dict[str, str]
    scoring_args: dict[str, object]
    overtakes: bool

    @property
    def batch_tokens(self) -> int | None:
        """Most tokens of one call of ``run``, padding included; ``None`` if the engine does not pad.

        An engine that pads computes every sequence of a batch at the length of the longest one.
        """

    async def start(self) -> None:
        """Load the model; raises the error that loading raised."""

    def choices(self) -> dict[str, object]:
        """Settings that the engine chose for this machine, by name, for the log; call it after ``start``."""

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Compute the model's number for each sequence.

        Args:
            sequences: The inputs; read each one once, because reading it may make it.
            urgent: Whether they overtake sequences that wait inside the engine; ignored if ``overtakes`` is false.

        Returns:
            Raw scores, shape ``(len(sequences),)``, or for a bi-encoder embeddings, shape ``(len(sequences), dim)``, in
            the order of ``sequences``; embeddings have norm 1 if the model's are normalized.

        Raises:
            EngineDeadError: The engine is gone.

        Cancelling the call withdraws work that has not begun, and ends as much of the running work as the engine can.
        """

    async def wait_dead(self) -> EngineDeadError:
        """Return once the engine has died; never returns after ``close``."""

    async def close(self) -> None:
        """End the engine with every process and thread that it started."""
