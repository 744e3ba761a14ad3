"""Caches in memory: known raw scores or embeddings, and pairs that are being scored.

Raw scores are kept in rows, one for each query, with a score for each of its documents. The least recently used row is
dropped first: training meets an anchor again with many of the same documents. A look-up of a pair costs one dictionary
access.

A key is made of three digests: the scope (all that a score depends on except the two texts), the query, the document.
Each part is hashed on its own, so that moving text from one part to another changes the key.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

_DIGEST_BYTES = 16
# In CPython: an entry with its key (16 bytes as an object) and its value (a float), and an empty row.
_ENTRY_BYTES = 160
_ROW_BYTES = 600
# Work of one step on the event loop, a few milliseconds: pairs, and as many pairs again as a row costs by itself.
_STEP = 8192
_STEP_ROW = 16

RowKey = tuple[bytes, bytes]
"""Scope and query digest."""


def scope_of(*parts: str | int | bool | None) -> bytes:
    """Digest of all that a score depends on except the texts; the type and length of each part count."""
    framed = (f"{type(part).__name__}:{part}".encode() for part in parts)
    return _digest(b"".join(len(data).to_bytes(8, "little") + data for data in framed))


def digest_of(text: str) -> bytes:
    """Digest of one text: 16 bytes of BLAKE2b, long enough that equal digests mean equal texts."""
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
    """Result of a look-up. Positions refer to the pairs that were looked up.

    Attributes:
        scores: Raw scores, float32, shape ``(n,)``; set only at ``known``.
        known: Positions of pairs whose score was cached.
        mine: Positions of pairs that the caller must score. It must call ``settle`` afterwards, also on failure.
        waiting: Positions of pairs that another caller scores; look them up again after ``waits``.
        waits: Futures that are done when those callers have settled.
    """

    scores: NDArray[np.float32]
    known: NDArray[np.intp]
    mine: NDArray[np.intp]
    waiting: NDArray[np.intp]
    waits: set[asyncio.Future[None]]
    _settled: asyncio.Future[None]
    _rows: list[tuple[RowKey, _Row, list[bytes]]]


class ScoreCache:
    """Raw scores by scope, query and document, bounded in bytes; all calls come from one event loop."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache whose rows take up at most ``max_bytes``, roughly."""
        self._rows: LRUCache[RowKey, _Row] = LRUCache(max_bytes, getsizeof=_Row.size)
        # Rows with pairs in flight, also those that the cache has dropped meanwhile.
        self._active: dict[RowKey, _Row] = {}

    @property
    def size_bytes(self) -> int:
        """Approximate size of the rows."""
        return int(self._rows.currsize)

    async def claim(
        self,
        scope: bytes,
        digests: Sequence[bytes],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        *,
        share: bool,
    ) -> Claim:
        """Look up pairs. The caller must score those that are neither cached nor in flight, and then settle the claim.

        Other work of the event loop runs after every thousand pairs or so.

        Args:
            scope: From ``scope_of``.
            digests: Digests of texts, by text id.
            query_ids: Text id of each pair's query, shape ``(n,)``.
            document_ids: Text id of each pair's document, shape ``(n,)``.
            share: Whether to wait for pairs that another caller is scoring; if false, this caller scores them as well.
        """
        scores = np.full(len(query_ids), np.nan, dtype=np.float32)
        claim = Claim(scores, *(np.empty(0, dtype=np.intp),) * 3, set(), asyncio.Future(), [])
        try:
            for _ in self._claim(claim, scope, digests, query_ids, document_ids, share):
                await asyncio.sleep(0)
        except BaseException:
            self.settle(claim, None)
            raise
        return claim

    def _claim(
        self,
        claim: Claim,
        scope: bytes,
        digests: Sequence[bytes],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        share: bool,
    ) -> Iterator[None]:
        """Look up pairs row by row; yields between steps."""
        mine: list[int] = []
        waiting: list[int] = []
        order = np.argsort(query_ids, kind="stable")
        # Plain lists, because numpy calls for each of many short rows would take most of the time.
        positions_by_query, queries = order.tolist(), query_ids[order]
        begins = np.flatnonzero(np.diff(queries, prepend=-1)).tolist()
        ends = [*begins[1:], len(order)] if begins else []
        row_queries, documents_by_query = queries[begins].tolist(), document_ids[order].tolist()
        scores: list[float | None] = []  # in the order of ``order``
        seen = 0
        for query, begin, end in zip(row_queries, begins, ends, strict=True):
            key = (scope, digests[query])
            # Compared with None, because an empty row is false.
            row = self._rows.get(key)
            row = self._active.get(key, _Row()) if row is None else row
            documents = [digests[one] for one in documents_by_query[begin:end]]
            found = list(map(row.scores.get, documents))
            claimed = []
            for index in [index for index, score in enumerate(found) if score is None]:
                document = documents[index]
                pending = row.pending.get(document)
                if pending is claim._settled or (share and pending is not None):
                    claim.waits.add(pending)
                    waiting.append(positions_by_query[begin + index])
                    continue
                row.pending.setdefault(document, claim._settled)
                claimed.append(document)
                mine.append(positions_by_query[begin + index])
            if claimed:
                self._active[key] = row
                claim._rows.append((key, row, claimed))
            scores += found
            seen += end - begin + _STEP_ROW
            if seen >= _STEP:
                seen = 0
                yield
        claim.scores[order] = np.array(scores, dtype=np.float32)  # None becomes NaN
        claim.known = np.flatnonzero(~np.isnan(claim.scores))
        claim.mine = np.array(mine, dtype=np.intp)
        claim.waiting = np.array(waiting, dtype=np.intp)

    def settle(self, claim: Claim, scores: NDArray[np.float32] | None) -> None:
        """End a claim, after success or failure.

        Args:
            claim: From ``claim``.
            scores: Raw scores of the pairs at ``claim.mine``, in that order; ``None`` after a failure. Callers that
                wait for these pairs then score them themselves.
        """
        for _ in self._settle(claim, scores):
            pass

    async def settle_in_steps(self, claim: Claim, scores: NDArray[np.float32]) -> None:
        """Do what ``settle`` does, and let other work of the event loop run after every thousand pairs or so."""
        steps = self._settle(claim, scores)
        try:
            for _ in steps:
                await asyncio.sleep(0)
        finally:
            for _ in steps:
                pass

    def _settle(self, claim: Claim, scores: NDArray[np.float32] | None) -> Iterator[None]:
        """Settle row by row; yields between steps. A row that is settled is known, or free to be claimed."""
        values = None if scores is None else scores.tolist()
        begin = seen = 0
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
            seen += len(claimed) + _STEP_ROW
            if seen >= _STEP:
                seen = 0
                yield
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
        """Approximate size of the embeddings."""
        return int(self._vectors.currsize)

    def get(self, scope: bytes, digest: bytes) -> tuple[NDArray[np.float32], bool] | None:
        """The embedding of a text and whether the text was truncated; ``None`` if it is not cached."""
        return self._vectors.get((scope, digest))

    def put(self, scope: bytes, digest: bytes, vector: NDArray[np.float32], truncated: bool) -> None:
        """Keep an embedding, unless it is larger than the whole cache."""
        if _ROW_BYTES + vector.nbytes <= self._vectors.maxsize:
            self._vectors[scope, digest] = (vector, truncated)
