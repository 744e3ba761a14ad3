"""Our server with an engine of fixed speed whose scores have a closed form; it writes down the pairs that it scores."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.instant import InstantEngine
from chaos.parent import end_with_parent
from chaos.scores import WORDS, numbers_of, raw_scores
from reranker_service import __main__, loading
from reranker_service.engines import TokenSequence
from reranker_service.models import ModelSpec
from reranker_service.settings import Settings

COUNT_BYTES = 4
"""Bytes of each number of pairs in the file of pairs scored, least significant byte first."""
_LENGTH = 2 * WORDS + 3  # [CLS] query [SEP] document [SEP]


class ClosedFormEngine(InstantEngine):
    """Implements ``Engine``: scores of the numbers that the texts stand for, finished at a fixed rate.

    Args:
        seed: The model. It counts for the fingerprint.
        rate: Pairs a second.
        scored: File that gets the number of pairs of each batch appended, so that the count outlives SIGKILL.
    """

    name = "closed-form"

    def __init__(self, seed: int, rate: float, scored: Path) -> None:
        super().__init__()
        # Large enough to keep the engine busy, small enough that streams take turns.
        self.max_batch = 256
        self.max_in_flight = 1024
        self.scoring_args = {"seed": seed}
        self._seed = seed
        self._rate = rate
        self._scored = os.open(scored, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._free = 0.0  # time at which the last pair in flight is finished, on the event loop's clock

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Return the scores, shape ``(n,)``, at the time at which the last sequence is finished."""
        os.write(self._scored, len(sequences).to_bytes(COUNT_BYTES, "little"))
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + len(sequences) / self._rate
        scores = _scores(sequences, self._seed)
        await asyncio.sleep(self._free - now)
        return scores


def _scores(sequences: Sequence[TokenSequence], seed: int) -> NDArray[np.float32]:
    ids = [sequence.ids for sequence in sequences]
    if any(len(one) != _LENGTH for one in ids):
        return np.zeros(len(ids), dtype=np.float32)  # the server's own first pair, which is no pair of numbers
    table = np.stack(ids)  # (n, _LENGTH)
    queries, documents = table[:, 1 : WORDS + 1], table[:, WORDS + 2 : -1]
    return raw_scores(numbers_of(queries), numbers_of(documents), seed)


def _make_engine(settings: Settings, spec: ModelSpec) -> ClosedFormEngine:
    return ClosedFormEngine(**{**settings.engine_args, "scored": Path(settings.engine_args["scored"])})


def main() -> None:
    """Run the server with the flags of ``python -m reranker_service``; ``--engine-args`` are the engine's own."""
    end_with_parent()
    with mock.patch.multiple(loading, make_engine=_make_engine, check_flags=mock.DEFAULT):
        __main__.main()


if __name__ == "__main__":
    main()
