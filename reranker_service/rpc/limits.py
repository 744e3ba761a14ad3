"""Limits of requests and streams. The defaults suit training batches of 4,096 queries and 4,096 documents.

A limit is one field of `Limits`, named as in the message ``reranker.v1.Limits``. The flag ``--limits.NAME`` and the
environment variable follow from it; `validation` and `stream` enforce it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from reranker.v1 import reranker_pb2 as pb


class Limits(BaseModel):
    """Limits of requests and streams. The message ``reranker.v1.Limits`` documents each of them."""

    model_config = ConfigDict(frozen=True)

    max_text_bytes: int = Field(1 << 20, ge=1, le=1 << 30, description="UTF-8 bytes of one text")
    max_documents_per_request: int = Field(4096, ge=1, le=1 << 20, description="documents of one Rerank request")
    max_requests_per_batch: int = Field(1024, ge=1, le=1 << 20, description="requests of one RerankBatch")
    max_pairs_per_batch: int = Field(
        16384, ge=1, le=1 << 22, description="documents of all requests of one RerankBatch together"
    )
    max_pairs_per_chunk: int = Field(16384, ge=1, le=1 << 22, description="pairs of one chunk of a stream")
    max_pairs_in_flight: int = Field(
        65536,
        ge=1,
        le=1 << 26,
        description="unanswered pairs of one stream at which the server stops reading from it (backpressure)",
    )
    max_texts_per_stream: int = Field(1 << 17, ge=1, le=1 << 26, description="texts of one stream")
    max_chunks_per_stream: int = Field(1 << 20, ge=1, le=1 << 26, description="chunks of one stream")
    max_text_bytes_per_stream: int = Field(
        1 << 30, ge=1, le=1 << 34, description="UTF-8 bytes of all texts of one stream"
    )
    max_message_bytes: int = Field(
        64 << 20, ge=1 << 16, le=(1 << 31) - 1, description="bytes of one gRPC message, in either direction"
    )

    def to_message(self) -> pb.Limits:
        """Express the limits as a message of the contract."""
        return pb.Limits(**self.model_dump())
