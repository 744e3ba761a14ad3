"""Limits of requests and streams, with defaults for training batches of 4,096 texts a column.

A limit is one field here. The flag ``--limits.NAME``, the environment variable and the field of ``GetModelInfo`` follow
from it; `validation` and `stream` enforce it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from reranker.v1 import reranker_pb2 as pb


class Limits(BaseModel):
    """Limits of requests and streams. The message ``reranker.v1.Limits`` documents each of them."""

    model_config = ConfigDict(frozen=True)

    max_text_bytes: int = Field(1 << 20, ge=1, le=1 << 30)
    max_documents_per_request: int = Field(4096, ge=1, le=1 << 20)
    max_requests_per_batch: int = Field(1024, ge=1, le=1 << 20)
    max_pairs_per_batch: int = Field(16384, ge=1, le=1 << 22)
    max_pairs_per_chunk: int = Field(16384, ge=1, le=1 << 22)
    max_pairs_in_flight: int = Field(65536, ge=1, le=1 << 26)
    max_texts_per_stream: int = Field(1 << 17, ge=1, le=1 << 26)
    max_chunks_per_stream: int = Field(1 << 20, ge=1, le=1 << 26)
    max_text_bytes_per_stream: int = Field(1 << 30, ge=1, le=1 << 34)
    max_message_bytes: int = Field(64 << 20, ge=1 << 16, le=(1 << 31) - 1)

    def to_message(self) -> pb.Limits:
        """Express the limits as the contract does."""
        return pb.Limits(**self.model_dump())
