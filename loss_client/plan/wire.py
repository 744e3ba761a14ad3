"""Bytes of a training step on the wire, by the sizes of the messages of contract 1.1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import islice

from loss_client.client.chunks import MOST_CHUNK_PAIRS, STREAM_CHUNK_PAIRS, grid_chunks, list_chunks
from loss_client.plan.batch import Batch

# Before each message: the length prefix of gRPC and the header of an HTTP/2 frame.
_FRAME_BYTES = 5 + 9
_SCORE_BYTES = 4
# Usage of a chunk: pairs and tokens as varints of two and three bytes, and two times of eight bytes, with their tags.
_USAGE_BYTES = 2 + (1 + 2) + (1 + 3) + 2 * (1 + 8)
# Chunks of a larger job are all as large as they may be, but for less than a hundredth of them.
_MANY_PAIRS = 1 << 27


@dataclass(frozen=True, slots=True)
class Texts:
    """Mean sizes of texts, in UTF-8 bytes.

    Attributes:
        query_bytes: Of a query.
        document_bytes: Of a document.
    """

    query_bytes: float
    document_bytes: float


def wire_bytes(batch: Batch, texts: Texts, pairs: int, chunk_pairs: int | None, listed: bool, streams: int = 1) -> int:
    """Return the bytes of a step, both directions together, with one server and TLS off.

    Each stream carries each text once. A chunk names its texts by ids: a grid each text of the chunk once, a list both
    texts of each pair. Every score takes four bytes.

    Args:
        batch: Sizes of the step.
        texts: Sizes of the texts.
        pairs: Pairs of the step, of all ranks.
        chunk_pairs: Most pairs of a chunk. None: few for the first and the last rows and more between them, as the
            client sends them if neither the server nor the caller names a number.
        listed: Whether chunks list pairs; otherwise the pairs are a grid of all queries and documents.
        streams: Streams of one rank.
    """
    of_rank = pairs / batch.ranks
    count = batch.rows + batch.documents
    first, most = (chunk_pairs, chunk_pairs) if chunk_pairs else (STREAM_CHUNK_PAIRS, MOST_CHUNK_PAIRS)
    if of_rank > _MANY_PAIRS:
        first = most
    if listed:
        chunks, ids = list_sizes(math.ceil(of_rank), first, most)
    else:
        chunks, ids = grid_sizes(batch.rows, batch.documents, first, most)
    sent = batch.rows * _text_bytes(texts.query_bytes) + batch.documents * _text_bytes(texts.document_bytes)
    id_bytes = ids * _mean_varint_bytes(count)
    per_chunk = ids / chunks * _mean_varint_bytes(count), of_rank / chunks * _SCORE_BYTES
    messages = chunks * (_request_bytes(per_chunk[0], chunks) + _reply_bytes(per_chunk[1], chunks))
    return round(batch.ranks * (streams * sent + id_bytes + messages + of_rank * _SCORE_BYTES))


@cache
def list_sizes(pairs: int, first: int, most: int) -> tuple[int, int]:
    """Return the number of chunks of a list of pairs, and the number of ids in all of them; see ``list_chunks``."""
    chunks = math.ceil(pairs / most) if first == most else sum(1 for _ in list_chunks(pairs, first, most=most))
    return chunks, 2 * pairs


@cache
def grid_sizes(rows: int, columns: int, first: int, most: int) -> tuple[int, int]:
    """Return the number of chunks of a grid, and the number of ids in all of them; see ``grid_chunks``."""
    if first != most:
        chunks = list(grid_chunks(rows, columns, first, most=most))
        sides = (chunk.row_end - chunk.row_begin + chunk.column_end - chunk.column_begin for chunk in chunks)
        return len(chunks), sum(sides)
    (chunk, *_) = islice(grid_chunks(rows, columns, most), 1)
    height = chunk.row_end
    bands, parts = math.ceil(rows / height), math.ceil(columns / (most // height))
    return bands * parts, rows * parts + columns * bands


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
