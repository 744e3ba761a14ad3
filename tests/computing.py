"""Results of the torch engine alone, without scheduler and RPCs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reranker_service.engines.torch_engine import TorchEngine
from reranker_service.models import ModelSpec, TokenSequence


def compute(spec: ModelSpec, sequences: Sequence[TokenSequence], **options: Any) -> NDArray[np.float32]:
    """Results of ``sequences``, computed with one thread; ``options`` are other arguments of the engine."""

    async def work() -> NDArray[np.float32]:
        engine = TorchEngine(spec, threads=1, **options)
        await engine.start()
        try:
            return await engine.run(sequences)
        finally:
            await engine.close()

    return asyncio.run(work())
