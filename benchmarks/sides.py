"""Sides over gRPC, and the side of a bare engine: each scores a grid and measures the time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.launch import address_of
from benchmarks.texts import Grid
from examples.processes import Child
from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

IN_FLIGHT = 8
"""Requests in flight of the sides that send one request a query."""
_TIMEOUT = 600.0


class ChildSide:
    """Side with one server or worker process.

    Args:
        name: Name in the table.
        process: Server or worker.
    """

    def __init__(self, name: str, process: Child) -> None:
        self.name = name
        self._process = process

    def pause(self) -> None:
        """Stop the side's processes (SIGSTOP)."""
        self._process.pause()

    def resume(self) -> None:
        """Continue the side's processes (SIGCONT)."""
        self._process.resume()


class BareSide(ChildSide):
    """Side of a worker of ``benchmarks.bare``; the worker measures the time, for an engine without tokenizing."""

    def __init__(self, name: str, process: Child) -> None:
        """Wait until the worker is ready, and connect. Raises ``ProcessError``."""
        super().__init__(name, process)
        host, _, port = address_of(process).rpartition(":")
        self._connection = Client((host, int(port)))

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        self._connection.send_bytes(json.dumps({"queries": grid.queries, "documents": grid.documents}).encode())
        reply = json.loads(self._connection.recv_bytes())
        return reply["seconds"], _shaped(grid, reply["scores"])


class StreamSide(ChildSide):
    """Side of ``RerankStream``, called through the client that training code uses.

    Args:
        name: Name in the table.
        process: Our server.
        client: Client of that server.
        chunk_pairs: Maximum number of pairs in a chunk.
    """

    def __init__(self, name: str, process: Child, client: RerankerClient, chunk_pairs: int = 128) -> None:
        super().__init__(name, process)
        self._client = client
        self._chunk_pairs = chunk_pairs

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        began = time.perf_counter()
        matrix = self._client.stream_grid(
            grid.queries, grid.documents, score_type="raw", chunk_pairs=self._chunk_pairs, timeout=_TIMEOUT
        )
        scores = matrix.result()
        return time.perf_counter() - began, scores


class UnarySide(ChildSide):
    """Side of ``Rerank``: one call a query with all documents, several calls in flight."""

    def __init__(self, name: str, process: Child, channel: grpc.Channel) -> None:
        super().__init__(name, process)
        self._stub = rpc.RerankerServiceStub(channel)

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        began = time.perf_counter()
        with ThreadPoolExecutor(IN_FLIGHT) as threads:
            responses = threads.map(lambda request: self._stub.Rerank(request, timeout=_TIMEOUT), _requests(grid))
            scores = np.stack([_by_index(response) for response in responses])
        return time.perf_counter() - began, scores


class BatchSide(ChildSide):
    """Side of ``RerankBatch``: all queries in one call."""

    def __init__(self, name: str, process: Child, channel: grpc.Channel) -> None:
        super().__init__(name, process)
        self._stub = rpc.RerankerServiceStub(channel)

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        began = time.perf_counter()
        batch = self._stub.RerankBatch(pb.RerankBatchRequest(requests=_requests(grid)), timeout=_TIMEOUT)
        scores = np.stack([_by_index(item.response) for item in batch.items])
        return time.perf_counter() - began, scores


def _requests(grid: Grid) -> Iterator[pb.RerankRequest]:
    options = pb.RerankOptions(score_type=pb.SCORE_TYPE_RAW)
    for query in grid.queries:
        yield pb.RerankRequest(query=query, documents=grid.documents, options=options)


def _by_index(response: pb.RerankResponse) -> NDArray[np.float32]:
    scores = np.empty(len(response.results), dtype=np.float32)
    for result in response.results:
        scores[result.index] = result.score
    return scores


def _shaped(grid: Grid, scores: list[float]) -> NDArray[np.float32]:
    return np.array(scores, dtype=np.float32).reshape(len(grid.queries), len(grid.documents))
