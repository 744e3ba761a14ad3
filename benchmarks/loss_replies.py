"""Server that answers chunks at once without a model, and takes little processor time, like a fast one elsewhere.

Texts begin with ``ROW.COLUMN``, where 0 is the anchors' column. A positive scores 0.98 for the anchor of its row. All
other scores come from a hash, evenly from [0, 1), so that about 2% of the negatives are above their threshold.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from grpc import aio
from numpy.typing import NDArray

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

_POSITIVE = 0.98
_LIMITS = pb.Limits(
    max_text_bytes=1 << 20,
    max_documents_per_request=1 << 10,
    max_requests_per_batch=1 << 7,
    max_pairs_per_batch=1 << 13,
    max_pairs_per_chunk=1 << 14,
    max_pairs_in_flight=1 << 17,
    max_texts_per_stream=1 << 17,
    max_text_bytes_per_stream=1 << 28,
    max_message_bytes=4 << 20,
    max_chunks_per_stream=1 << 20,
)


def scores_of(
    queries: NDArray[np.int64], documents: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the scores of pairs, in the broadcast shape of rows of queries, rows of documents and their columns."""
    mixed = queries * 2_654_435_761 + (documents * 8 + columns) * 2_246_822_519
    mixed = (mixed ^ (mixed >> 15)) * 3_266_489_917 & 0xFFFFFF
    own = (queries == documents) & (columns == 1)
    return np.where(own, _POSITIVE, mixed / (1 << 24)).astype(np.float32)


class _Servicer(rpc.RerankerServiceServicer):
    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return pb.GetModelInfoResponse(
            model="replies",
            kind=pb.MODEL_KIND_CROSS_ENCODER,
            fingerprint="replies",
            max_length=512,
            default_length=512,
            limits=_LIMITS,
            contract=pb.ContractVersion(major=1, minor=1),
        )

    async def Rerank(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def RerankBatch(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def RerankStream(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        rows, columns = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        async for request in request_iterator:
            kind = request.WhichOneof("message")
            if kind == "open":
                yield pb.RerankStreamResponse(opened=pb.StreamOpened(fingerprint="replies", limits=_LIMITS))
            elif kind == "texts":
                names = [text.partition(" ")[0].split(".") for text in request.texts.texts]
                rows = np.append(rows, [int(row) for row, _ in names])
                columns = np.append(columns, [int(column) for _, column in names])
            elif kind == "chunk":
                chunk = request.chunk
                grid = chunk.WhichOneof("pairs") == "grid"
                ids = chunk.grid if grid else chunk.list
                queries, documents = np.array(ids.query_ids), np.array(ids.document_ids)
                asking = rows[queries][:, None] if grid else rows[queries]
                values = scores_of(asking, rows[documents], columns[documents]).ravel()
                result = pb.ChunkResult(id=chunk.id, usage=pb.Usage(pairs=len(values), tokens=len(values)))
                result.scores.values.extend(values)
                yield pb.RerankStreamResponse(result=result)


async def _serve() -> None:
    server = aio.server(options=[("grpc.max_receive_message_length", -1)])
    rpc.add_RerankerServiceServicer_to_server(_Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"event=ready address=127.0.0.1:{port}\n", end="", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
