"""Our server around an engine of fixed speed, which takes no processor time: it stands for a GPU somewhere else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.instant import InstantEngine
from reranker_service import __main__, loading
from reranker_service.engines import TokenSequence
from reranker_service.models import ModelSpec
from reranker_service.settings import Settings

RATE_FILE = "rate_file"
"""The engine argument that says which file holds the rate, in pairs a second."""


class FixedSpeedEngine(InstantEngine):
    """Implements ``Engine``: every score is 0, and pairs are due one after the other at a set rate.

    Args:
        rate_file: Holds the rate in pairs a second; read for each batch, so that it can change while the server runs.
    """

    name = "fixed-speed"

    def __init__(self, rate_file: Path) -> None:
        super().__init__()
        # Enough to be kept busy at the highest rates; little enough that streams take turns.
        self.max_batch = 128
        self.max_in_flight = 512
        self._rate_file = rate_file
        self._free = 0.0  # when all that it was given will be done, in the event loop's seconds

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Zeros, shape ``(n,)``, at the time they are due."""
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + len(sequences) / float(self._rate_file.read_text(encoding="ascii"))
        await asyncio.sleep(self._free - now)
        return await super().run(sequences)


def write_rate(path: Path, pairs_a_second: float) -> None:
    """Set the rate of the engine that reads ``path``."""
    # The engine must never see half a number.
    draft = path.with_suffix(".new")
    draft.write_text(repr(pairs_a_second), encoding="ascii")
    os.replace(draft, path)


def _make_engine(settings: Settings, spec: ModelSpec) -> FixedSpeedEngine:
    return FixedSpeedEngine(Path(settings.engine_args[RATE_FILE]))


def main() -> None:
    """Run the server; its flags are those of ``python -m reranker_service``."""
    with mock.patch.object(loading, "make_engine", _make_engine):
        __main__.main()


if __name__ == "__main__":
    main()
