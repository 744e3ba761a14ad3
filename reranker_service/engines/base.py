"""What an engine is: token sequences in, one number or one vector a sequence out.

An engine knows nothing of texts, queries, templates, caches or clients. It runs what it is given, as fast as it can;
who comes first is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One input of the model.

    Attributes:
        ids: Token ids with all special and template tokens, int32, shape ``(length,)``.
        first_segment: How many leading tokens are of segment 0; the rest are of segment 1. The whole length for
            models that know one segment only.
    """

    ids: NDArray[np.int32]
    first_segment: int


class EngineDeadError(RuntimeError):
    """The engine can no longer answer; the process has to end."""


class Engine(Protocol):
    """Computes raw scores or embeddings.

    Attributes:
        name: ``"torch"`` or ``"vllm"``.
        dtype: Number format of the computation, such as ``"float32"``.
        max_in_flight: How many sequences it wants at a time to be kept busy; more only wait inside it. One that pads
            wants two batches, whatever they hold.
        max_batch: How many sequences one call of ``run`` should hold at most.
        step_tokens: How many tokens it computes at a time, where it takes sequences one by one; ``None`` if it does not
            matter. Beside ``max_in_flight``, a few such steps are all that it is given at a time.
        versions: Distribution name to version of the libraries that compute.
        scoring_args: What else it was told that may change scores, by name.
        overtakes: Whether urgent sequences go before the others that wait inside it.
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
        """How many tokens one call of ``run`` should hold at most, padding included; ``None`` if it does not pad.

        Where it pads, a batch costs as much as its longest sequence: give it sequences of like length.
        """

    async def start(self) -> None:
        """Load the model. Raises what loading raised."""

    def choices(self) -> dict[str, object]:
        """What it chose for this machine, by name, for the log; after ``start``."""

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Compute the model's number for each sequence.

        Args:
            sequences: The inputs. They may be made when they are read: read each one once.
            urgent: Whether to compute them before others that wait inside; without effect unless it overtakes.

        Returns:
            Raw scores, shape ``(len(sequences),)``, or for a bi-encoder unit-norm embeddings, shape
            ``(len(sequences), dim)``, in the order of ``sequences``.

        Raises:
            EngineDeadError: The engine is gone.

        Cancelling the call frees the engine of the work as far as it can be freed.
        """

    async def wait_dead(self) -> EngineDeadError:
        """Return once the engine has died by itself; never after ``close``."""

    async def close(self) -> None:
        """End the engine and every process and thread it started."""
