"""Our server with an engine that returns at once, to measure the cost of everything except the engine."""

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
    """Implements ``Engine``: every score is 0, whatever the input."""

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
        """Do nothing: there is no model to load."""

    def choices(self) -> dict[str, object]:
        """Return no choices."""
        return {}

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Return zeros, shape ``(n,)``."""
        return np.zeros(len(sequences), dtype=np.float32)

    async def wait_dead(self) -> EngineDeadError:
        """Wait forever: this engine cannot die."""
        await asyncio.Event().wait()
        raise AssertionError("the event is never set")

    async def close(self) -> None:
        """Do nothing: there is nothing to free."""


def _make_engine(settings: Settings, spec: ModelSpec) -> InstantEngine:
    return InstantEngine()


def main() -> None:
    """Run the server with the flags of ``python -m reranker_service``."""
    with mock.patch.object(loading, "make_engine", _make_engine):
        __main__.main()


if __name__ == "__main__":
    main()
