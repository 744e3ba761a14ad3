"""Bytes of a training step on the wire, by the sizes of the messages of contract 1.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loss_client.plan.batch import Batch

# Before each message: the length prefix of gRPC and the header of an HTTP/2 frame.
_FRAME_BYTES = 5 + 9
_SCORE_BYTES = 4
# Usage of a chunk: pairs and tokens as varints of two and three bytes, and two times of eight bytes, with their tags.
_USAGE_BYTES = 2 + (1 + 2) + (1 + 3) + 2 * (1 + 8)
# Rows of a chunk of a grid.
_BAND_ROWS = 8


@dataclass(frozen=True, slots=True)
class Texts:
    """Mean sizes of texts, in UTF-8 bytes.

    Attributes:
        query_bytes: Of a query.
        document_bytes: Of a document.
    """

    query_bytes: float
    document_bytes: float


def wire_bytes(batch: Batch, texts: Texts, pairs: int, chunk_pairs: int, listed: bool, streams: int = 1) -> int:
    """Return the bytes of a step, both directions together, with one server and TLS off.

    Each stream carries each text once. A chunk names its texts by ids: a grid each text of the chunk once, a list both
    texts of each pair. Every score takes four bytes.

    Args:
        batch: Sizes of the step.
        texts: Sizes of the texts.
        pairs: Pairs of the step, of all ranks.
        chunk_pairs: Most pairs of a chunk.
        listed: Whether chunks list pairs; otherwise the pairs are a grid of all queries and documents.
        streams: Streams of one rank.
    """
    of_rank = pairs / batch.ranks
    chunk_pairs = min(chunk_pairs, math.ceil(of_rank))
    count = batch.rows + batch.documents
    if listed:
        chunks = math.ceil(of_rank / chunk_pairs)
        ids = 2 * of_rank
    else:
        height = max(min(_BAND_ROWS, math.isqrt(chunk_pairs)), chunk_pairs // batch.documents)
        height = min(height, batch.rows)
        bands = math.ceil(batch.rows / height)
        parts = math.ceil(batch.documents / (chunk_pairs // height))
        chunks = bands * parts
        ids = batch.rows * parts + batch.documents * bands
    sent = batch.rows * _text_bytes(texts.query_bytes) + batch.documents * _text_bytes(texts.document_bytes)
    id_bytes = ids * _mean_varint_bytes(count)
    per_chunk = ids / chunks * _mean_varint_bytes(count), of_rank / chunks * _SCORE_BYTES
    messages = chunks * (_request_bytes(per_chunk[0], chunks) + _reply_bytes(per_chunk[1], chunks))
    return round(batch.ranks * (streams * sent + id_bytes + messages + of_rank * _SCORE_BYTES))


def _request_bytes(id_bytes: float, chunks: int) -> float:
    """Bytes of a chunk's message beside its ids: its number, two lists of ids, and three messages around them."""
    lists = 2 * _field_bytes(id_bytes / 2)
    return _FRAME_BYTES + 1 + _mean_varint_bytes(chunks) + lists + 2 * _field_bytes(id_bytes)


def _reply_bytes(score_bytes: float, chunks: int) -> float:
    """Bytes of a chunk's reply beside its scores: its number, its usage, and three messages around them."""
    return _FRAME_BYTES + 1 + _mean_varint_bytes(chunks) + 3 * _field_bytes(score_bytes) + _USAGE_BYTES


def _text_bytes(size: float) -> float:
    return size + _field_bytes(size)


def _field_bytes(size: float) -> float:
    """Bytes of the tag and the length before ``size`` bytes."""
    return 1 + _varint_bytes(math.floor(size))


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


def _mean_varint_bytes(count: int) -> float:
    """Mean size of the numbers below ``count``: one byte below 128, two below 16,384, and so on."""
    size, below, total = 1, 0, 0
    while below < count:
        upper = min(1 << 7 * size, count)
        total += size * (upper - below)
        below, size = upper, size + 1
    return total / count
