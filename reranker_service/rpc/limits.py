"""Limits of requests and streams. The defaults suit training batches of 4,096 queries and 4,096 documents.

A limit is one field of `Limits`, named as in the message ``reranker.v1.Limits``. The flag ``--limits.NAME`` and the
environment variable follow from it; `validation` and `stream` enforce it.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reranker.v1 import reranker_pb2 as pb

# Sizes on the wire, at most: of a score in a chunk's reply, of a result without its document, of a batch's item without
# its results (a short error, or counts and times), and of the rest of a message.
_SCORE_BYTES = 4
_RESULT_BYTES = 16
_ITEM_BYTES = 512
_MESSAGE_BYTES = 1024


class Limits(BaseModel):
    """Limits of requests and streams. The message ``reranker.v1.Limits`` documents each of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        8 << 20, ge=1 << 16, le=(1 << 31) - 1, description="bytes of one gRPC message, in either direction"
    )

    @model_validator(mode="after")
    def _need_agreement(self) -> Self:
        """Refuse limits that contradict each other: what one allows, another one would fail."""
        id_bytes = -(-(self.max_texts_per_stream - 1).bit_length() // 7) or 1
        contradictions = [
            f"{_flag(name)} is {getattr(self, name)}, {meaning} {needed} bytes, but {_flag(limit)} is "
            f"{getattr(self, limit)}; lower the first or raise the second"
            for name, meaning, needed, limit in (
                ("max_text_bytes", "and a message with such a text has", self.max_text_bytes, "max_message_bytes"),
                ("max_text_bytes", "and such a text has", self.max_text_bytes, "max_text_bytes_per_stream"),
                (
                    "max_pairs_per_chunk",
                    "and a chunk of so many listed pairs, or its reply, may have",
                    max(2 * id_bytes, _SCORE_BYTES) * self.max_pairs_per_chunk,
                    "max_message_bytes",
                ),
                (
                    "max_documents_per_request",
                    "and a reply with so many scores may have",
                    _RESULT_BYTES * self.max_documents_per_request,
                    "max_message_bytes",
                ),
                (
                    "max_pairs_per_batch",
                    "and a reply with so many scores may have",
                    _RESULT_BYTES * self.max_pairs_per_batch,
                    "max_message_bytes",
                ),
                (
                    "max_requests_per_batch",
                    "and a reply with so many items may have",
                    _ITEM_BYTES * self.max_requests_per_batch,
                    "max_message_bytes",
                ),
            )
            if needed + (_MESSAGE_BYTES if limit == "max_message_bytes" else 0) > getattr(self, limit)
        ]
        if contradictions:
            raise ValueError("; ".join(contradictions))
        return self

    def to_message(self) -> pb.Limits:
        """Express the limits as a message of the contract."""
        return pb.Limits(**self.model_dump())


def _flag(name: str) -> str:
    return f"--limits.{name.replace('_', '-')}"
