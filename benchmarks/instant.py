"""Our server around an engine that answers at once: what remains is the cost of everything but the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from reranker_service import __main__, loading
from reranker_service.engines import EngineDeadError, TokenSequence
from reranker_service.models import ModelSpec
from reranker_service.settings import Settings


class InstantEngine:
    """Implements ``Engine``: every score is 0, and no input is looked at."""

    name = "instant"
    dtype = "float32"
    batch_tokens = None
    overtakes = False
    step_tokens: int | None = None

    def __init__(self) -> None:
        self.max_batch = 1 << 14
        self.max_in_flight = 1 << 15
        self.versions: dict[str, str] = {}
        self.scoring_args: dict[str, object] = {}

    async def start(self) -> None:
        """Nothing to load."""

    def choices(self) -> dict[str, object]:
        """Nothing to choose."""
        return {}

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Zeros, shape ``(n,)``."""
        return np.zeros(len(sequences), dtype=np.float32)

    async def wait_dead(self) -> EngineDeadError:
        """Never returns."""
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    async def close(self) -> None:
        """Nothing to free."""


def _make_engine(settings: Settings, spec: ModelSpec) -> InstantEngine:
    return InstantEngine()


def main() -> None:
    """Run the server; its flags are those of ``python -m reranker_service``."""
    with mock.patch.object(loading, "make_engine", _make_engine):
        __main__.main()


if __name__ == "__main__":
    main()
