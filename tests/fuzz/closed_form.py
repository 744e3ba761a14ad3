"""The real server with an engine that computes a closed form of the token ids: ``python -m tests.fuzz.closed_form``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.instant import InstantEngine
from reranker_service import __main__, loading
from reranker_service.engines import TokenSequence

PRIME = 1009


class ClosedFormEngine(InstantEngine):
    """Implements ``Engine``: the raw score is the sum of place x id over the tokens, modulo a prime, scaled to [-4, 4].

    It gives the event loop a turn in every batch, so that calls overlap as they do with a model.
    """

    name = "closed form"

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        await asyncio.sleep(0)
        sums = [int(np.dot(one.ids.astype(np.int64), np.arange(1, len(one.ids) + 1))) for one in sequences]
        return (np.array(sums) % PRIME / PRIME * 8 - 4).astype(np.float32)


if __name__ == "__main__":
    with mock.patch.object(loading, "make_engine", return_value=ClosedFormEngine()):
        __main__.main()
