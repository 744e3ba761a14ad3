"""The real server with an engine that holds long sequences back: run with ``python -m tests.holding``."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.instant import InstantEngine
from reranker_service import __main__, loading
from reranker_service.engines import EngineDeadError, TokenSequence

LONG_TOKENS = 64
RELEASE = signal.SIGUSR1
DIE = signal.SIGUSR2


class HoldingEngine(InstantEngine):
    """Implements ``Engine``: answers sequences of at least ``LONG_TOKENS`` after a signal, and shorter ones at once."""

    name = "holding"

    def __init__(self) -> None:
        super().__init__()
        self.max_batch = 1  # so that a long sequence never keeps a short one waiting
        self._released, self._dead = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        asyncio.get_running_loop().add_signal_handler(RELEASE, self._released.set)
        asyncio.get_running_loop().add_signal_handler(DIE, self._dead.set)

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        if any(len(sequence.ids) >= LONG_TOKENS for sequence in sequences):
            await self._released.wait()
        return await super().run(sequences)

    async def wait_dead(self) -> EngineDeadError:
        await self._dead.wait()
        return EngineDeadError("it was told to")


if __name__ == "__main__":
    with mock.patch.object(loading, "make_engine", return_value=HoldingEngine()):
        __main__.main()
