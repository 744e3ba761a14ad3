"""A job by unary calls of ``RerankBatch``, for servers without streams: every pair carries its texts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from loss_client.client.channels import Channels
from loss_client.client.chunks import Chunk
from loss_client.client.errors import ScoreError, from_status
from loss_client.client.job import Job
from loss_client.client.patience import Patience
from loss_client.client.progress import Progress
from reranker.v1 import reranker_pb2 as pb

_CALLS_IN_FLIGHT = 4
_TEXT_OVERHEAD_BYTES = 16


async def score_in_batches(job: Job, progress: Progress, channels: Channels, patience: Patience) -> None:
    """Score what is left of a job by unary calls, a few at a time, in order.

    Raises:
        RerankerError: A request failed.
        ScoreError: An answer does not fit its request.
    """
    channels.warn_of_fallback()
    info: pb.GetModelInfoResponse = await channels.call(
        lambda stub: stub.GetModelInfo, pb.GetModelInfoRequest(), patience, pin=job.pin
    )
    progress.plan(job.pairs_per_chunk(info.preferred_pairs_per_chunk))
    pieces = _fitting(job, progress, info)

    async def work() -> None:
        for chunk in pieces:
            await _score(job, progress, chunk, channels, patience.branch())

    workers = [asyncio.get_running_loop().create_task(work()) for _ in range(_CALLS_IN_FLIGHT)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)


async def _score(job: Job, progress: Progress, chunk: Chunk, channels: Channels, patience: Patience) -> None:
    request = pb.RerankBatchRequest(requests=_requests(job, progress, chunk))

    def read(response: pb.RerankBatchResponse) -> tuple[NDArray[np.float32], pb.RerankBatchResponse]:
        return _scores(request, response), response

    scores, response = await channels.call(lambda stub: stub.RerankBatch, request, patience, read, job.pin)
    patience.progress()
    progress.take(chunk, scores, [item.response.usage for item in response.items])


def _requests(job: Job, progress: Progress, chunk: Chunk) -> list[pb.RerankRequest]:
    texts = job.pairs.table.texts
    queries, documents = progress.ids(chunk)
    if job.pairs.grid:
        parts = [(query, documents) for query in queries]
    else:
        # The pairs of one query are neighbours; each run of them is one request.
        starts = [0, *(np.flatnonzero(np.diff(queries)) + 1).tolist()]
        ends = [*starts[1:], len(queries)]
        parts = [(queries[begin], documents[begin:end]) for begin, end in zip(starts, ends, strict=True)]
    return [
        pb.RerankRequest(query=texts[query], documents=[texts[each] for each in part], options=job.options)
        for query, part in parts
    ]


def _scores(request: pb.RerankBatchRequest, response: pb.RerankBatchResponse) -> NDArray[np.float32]:
    if len(response.items) != len(request.requests):
        raise ScoreError(f"the server answered {len(request.requests)} requests with {len(response.items)} items")
    rows = []
    for item, asked in zip(response.items, request.requests, strict=True):
        if item.WhichOneof("outcome") == "error":
            raise from_status(item.error)
        row = np.full(len(asked.documents), np.nan, dtype=np.float32)
        for result in item.response.results:
            if result.index >= len(row):
                raise ScoreError(f"the server ranked document {result.index} of {len(row)}")
            row[result.index] = result.score
        if not np.isfinite(row).all():
            raise ScoreError("the server left out the score of a document, or sent one that is not finite")
        rows.append(row)
    return np.concatenate(rows)


def _fitting(job: Job, progress: Progress, info: pb.GetModelInfoResponse) -> Iterator[Chunk]:
    """Cut the chunks that are left until each fits one call; a single pair always counts as fitting."""
    limits, preferred = info.limits, info.preferred_pairs_per_chunk
    while (chunk := progress.next_chunk(job.pairs_per_chunk(preferred))) is not None:
        waiting = [chunk]
        while waiting:
            piece = waiting.pop()
            if piece.pairs == 1 or _fits(job, progress, piece, limits):
                yield piece
            else:
                waiting += reversed(piece.halves())


def _fits(job: Job, progress: Progress, chunk: Chunk, limits: pb.Limits) -> bool:
    sizes, grid = job.pairs.table.sizes, job.pairs.grid
    queries, documents = progress.ids(chunk)
    query_bytes = sum(sizes[text] + _TEXT_OVERHEAD_BYTES for text in queries)
    document_bytes = sum(sizes[text] + _TEXT_OVERHEAD_BYTES for text in documents)
    rows = len(queries) if grid else len(np.flatnonzero(np.diff(queries))) + 1
    options_bytes = rows * job.options.ByteSize()
    return (
        rows <= limits.max_requests_per_batch
        and len(documents) <= limits.max_documents_per_request
        and chunk.pairs <= limits.max_pairs_per_batch
        and query_bytes + options_bytes + document_bytes * (rows if grid else 1) < limits.max_message_bytes
    )
