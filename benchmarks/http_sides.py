"""Sides over HTTP: vLLM's ``/score`` and ``/rerank``, and the baseline service; one request a query, 8 in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from benchmarks.sides import IN_FLIGHT, ChildSide
from benchmarks.texts import Grid
from examples.processes import Child

_TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True, slots=True)
class Dialect:
    """Request and response format of a service.

    Attributes:
        path: Path of the URL.
        ask: Makes the request's JSON from a query and its documents.
        read: Takes raw scores, in the order of the documents, from the response's JSON.
    """

    path: str
    ask: Callable[[str, Sequence[str]], dict[str, Any]]
    read: Callable[[dict[str, Any]], list[float]]


def _in_order(results: list[dict[str, Any]], key: str) -> list[float]:
    return [result[key] for result in sorted(results, key=lambda result: result["index"])]


VLLM_SCORE = Dialect(
    "/score",
    lambda query, documents: {"model": "model", "text_1": query, "text_2": documents, "use_activation": False},
    lambda reply: _in_order(reply["data"], "score"),
)
"""Format of vLLM's ``/score``."""
VLLM_RERANK = Dialect(
    "/rerank",
    lambda query, documents: {"model": "model", "query": query, "documents": documents, "use_activation": False},
    lambda reply: _in_order(reply["results"], "relevance_score"),
)
"""Format of vLLM's ``/rerank``."""
BASELINE = Dialect(
    "/score",
    lambda query, documents: {"pairs": [[query, document] for document in documents]},
    lambda reply: [float(score) for score in reply["scores"]],
)
"""Format of the service in ``benchmarks.baseline``."""


class HttpSide(ChildSide):
    """Side that sends one HTTP request a query.

    Args:
        name: Name in the table.
        process: Process of the service.
        address: ``HOST:PORT`` of the service.
        dialect: Request and response format of the service.
    """

    def __init__(self, name: str, process: Child, address: str, dialect: Dialect) -> None:
        super().__init__(name, process)
        self._url = f"http://{address}{dialect.path}"
        self._dialect = dialect

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        began = time.perf_counter()
        scores = asyncio.run(self._score(grid))
        return time.perf_counter() - began, scores

    async def _score(self, grid: Grid) -> NDArray[np.float32]:
        free = asyncio.Semaphore(IN_FLIGHT)
        # New connections for each grid: services close connections that were idle during the other sides' turns.
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:

            async def one(query: str) -> list[float]:
                async with free, session.post(self._url, json=self._dialect.ask(query, grid.documents)) as response:
                    response.raise_for_status()
                    return self._dialect.read(await response.json())

            rows = await asyncio.gather(*(one(query) for query in grid.queries))
        return np.array(rows, dtype=np.float32)
