"""Scores already known, and pairs that somebody is scoring right now.

Raw scores are kept by query: one row for each query, with its documents in it, and rows leave least recently used
first. Training meets an anchor again with many of the same documents, so a row is what comes and goes together; and
looking up a pair costs one dictionary access.

A key is a scope (everything beside the two texts that a score depends on), the query's digest and the document's. Each
is hashed on its own, so no two keys can be made equal by where one text ends and the next begins.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

_DIGEST_BYTES = 16
# In CPython: an entry with its key (16 bytes as an object) and its value (a float), and an empty row.
_ENTRY_BYTES = 160
_ROW_BYTES = 600

RowKey = tuple[bytes, bytes]
"""Scope and query digest."""


def scope_of(*parts: str | int | bool | None) -> bytes:
    """Digest of everything beside the texts that a score depends on; types and lengths are part of it."""
    framed = (f"{type(part).__name__}:{part}".encode() for part in parts)
    return _digest(b"".join(len(data).to_bytes(8, "little") + data for data in framed))


def digest_of(text: str) -> bytes:
    """Digest of one text, 16 bytes of BLAKE2b: two texts with equal digests are not to be expected, ever."""
    return _digest(text.encode())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


@dataclass(eq=False, slots=True)
class _Row:
    """One query in one scope: known raw scores by document, and documents that are being scored."""

    scores: dict[bytes, float] = field(default_factory=dict)
    pending: dict[bytes, asyncio.Future[None]] = field(default_factory=dict)

    def size(self) -> int:
        return _ROW_BYTES + _ENTRY_BYTES * len(self.scores)


@dataclass(eq=False, slots=True)
class Claim:
    """What a look-up found. Positions are those of the pairs that were asked for.

    Attributes:
        scores: Raw scores, float32, shape ``(n,)``; set at ``known`` only.
        known: Positions whose score was there.
        mine: Positions that the caller has to score, and then to ``settle``, come what may.
        waiting: Positions that are being scored already; look them up again after ``waits``.
        waits: What to wait for.
    """

    scores: NDArray[np.float32]
    known: NDArray[np.intp]
    mine: NDArray[np.intp]
    waiting: NDArray[np.intp]
    waits: set[asyncio.Future[None]]
    _settled: asyncio.Future[None]
    _rows: list[tuple[RowKey, _Row, list[bytes]]]


class ScoreCache:
    """Raw scores by scope, query and document, bounded in bytes; lives on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache whose rows take up at most ``max_bytes``, roughly."""
        self._rows: LRUCache[RowKey, _Row] = LRUCache(max_bytes, getsizeof=_Row.size)
        # Rows with pairs in flight: found here even if they have left the cache meanwhile.
        self._active: dict[RowKey, _Row] = {}

    @property
    def size_bytes(self) -> int:
        """What the rows take up, roughly."""
        return int(self._rows.currsize)

    def claim(
        self,
        scope: bytes,
        digests: Sequence[bytes],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        *,
        share: bool,
    ) -> Claim:
        """Look pairs up; those that nobody knows or scores become the caller's.

        Args:
            scope: From ``scope_of``.
            digests: Digests of texts, by text id.
            query_ids: Text id of each pair's query, shape ``(n,)``.
            document_ids: Text id of each pair's document, shape ``(n,)``.
            share: Whether the caller would rather wait for a pair that somebody else scores than score it again.
        """
        scores = np.full(len(query_ids), np.nan, dtype=np.float32)
        claim = Claim(scores, *(np.empty(0, dtype=np.intp),) * 3, set(), asyncio.Future(), [])
        mine: list[int] = []
        waiting: list[int] = []
        order = np.argsort(query_ids, kind="stable")
        borders = np.flatnonzero(np.diff(query_ids[order])) + 1
        for positions in np.split(order, borders):
            if not len(positions):
                continue
            key = (scope, digests[query_ids[positions[0]]])
            # An empty row is false, too: only None means that there is none.
            row = self._rows.get(key)
            row = self._active.get(key, _Row()) if row is None else row
            documents = [digests[one] for one in document_ids[positions].tolist()]
            scores[positions] = np.array(list(map(row.scores.get, documents)), dtype=np.float32)  # None becomes NaN
            claimed = []
            for index in np.flatnonzero(np.isnan(scores[positions])).tolist():
                pending = row.pending.get(documents[index])
                if pending is claim._settled or (share and pending is not None):
                    claim.waits.add(pending)
                    waiting.append(int(positions[index]))
                    continue
                row.pending.setdefault(documents[index], claim._settled)
                claimed.append(documents[index])
                mine.append(int(positions[index]))
            if claimed:
                self._active[key] = row
                claim._rows.append((key, row, claimed))
        claim.known = np.flatnonzero(~np.isnan(scores))
        claim.mine = np.array(mine, dtype=np.intp)
        claim.waiting = np.array(waiting, dtype=np.intp)
        return claim

    def settle(self, claim: Claim, scores: NDArray[np.float32] | None) -> None:
        """End a claim.

        Args:
            claim: From ``claim``.
            scores: Raw scores of the pairs at ``claim.mine``, in that order; ``None`` if they could not be had, so
                that whoever waits for them tries for itself.
        """
        values = None if scores is None else scores.tolist()
        begin = 0
        for key, row, claimed in claim._rows:
            for document in claimed:
                if row.pending.get(document) is claim._settled:
                    del row.pending[document]
            if not row.pending:
                self._active.pop(key, None)
            if values is not None:
                row.scores.update(zip(claimed, values[begin : begin + len(claimed)], strict=True))
                begin += len(claimed)
                self._keep(key, row)
        claim._settled.set_result(None)

    def _keep(self, key: RowKey, row: _Row) -> None:
        try:
            self._rows[key] = row
        except ValueError:  # larger than the whole cache
            self._rows.pop(key, None)
            row.scores.clear()


class EmbeddingCache:
    """Embeddings by scope and text, bounded in bytes, least recently used first out; for bi-encoders."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache whose embeddings take up at most ``max_bytes``, roughly."""
        self._vectors: LRUCache[RowKey, tuple[NDArray[np.float32], bool]] = LRUCache(
            max_bytes, getsizeof=lambda entry: _ROW_BYTES + entry[0].nbytes
        )

    @property
    def size_bytes(self) -> int:
        """What the embeddings take up, roughly."""
        return int(self._vectors.currsize)

    def get(self, scope: bytes, digest: bytes) -> tuple[NDArray[np.float32], bool] | None:
        """The embedding of a text and whether the text was cut, if they are known."""
        return self._vectors.get((scope, digest))

    def put(self, scope: bytes, digest: bytes, vector: NDArray[np.float32], truncated: bool) -> None:
        """Keep an embedding, unless it is larger than the whole cache."""
        if _ROW_BYTES + vector.nbytes <= self._vectors.maxsize:
            self._vectors[scope, digest] = (vector, truncated)
