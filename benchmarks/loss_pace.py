"""Our server with an engine of fixed speed that uses no processor time, like a GPU on another machine."""

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
"""Name of the engine argument for the path of the file that holds the rate, in pairs a second."""


class FixedSpeedEngine(InstantEngine):
    """Implements ``Engine``: every score is 0, and pairs are finished one after the other at a fixed rate.

    Args:
        rate_file: File with the rate in pairs a second; read for each batch, so that it can change while the server
            runs.
    """

    name = "fixed-speed"

    def __init__(self, rate_file: Path) -> None:
        super().__init__()
        # Large enough to keep the engine busy at the highest rates, small enough that streams take turns.
        self.max_batch = 128
        self.max_in_flight = 512
        self._rate_file = rate_file
        self._free = 0.0  # time at which the last pair in flight is finished, on the event loop's clock

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Return zeros, shape ``(n,)``, at the time at which the last sequence is finished."""
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + len(sequences) / float(self._rate_file.read_text(encoding="ascii"))
        await asyncio.sleep(self._free - now)
        return await super().run(sequences)


def write_rate(path: Path, pairs_a_second: float) -> None:
    """Set the rate of the engine that reads ``path``."""
    # Replaced in one step, so that the engine never reads a partly written number.
    draft = path.with_suffix(".new")
    draft.write_text(repr(pairs_a_second), encoding="ascii")
    os.replace(draft, path)


def _make_engine(settings: Settings, spec: ModelSpec) -> FixedSpeedEngine:
    return FixedSpeedEngine(Path(settings.engine_args[RATE_FILE]))


def main() -> None:
    """Run the server with the flags of ``python -m reranker_service``."""
    with mock.patch.multiple(loading, make_engine=_make_engine, check_flags=mock.DEFAULT):
        __main__.main()


if __name__ == "__main__":
    main()
