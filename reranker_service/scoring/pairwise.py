"""Raw scores of cross-encoders and causal rerankers, which read both texts of a pair together.

A pair's score comes from the cache, from another request that is scoring the same pair, or from the engine. A pair's
token sequence is joined from the encoded texts when the engine reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..models import EncodedText, PairLayout, TokenSequence
from ..scheduling import Job, Scheduler
from .cache import ScoreCache
from .disk import DiskCache
from .encoding import TextEncoder
from .errors import OverLongError
from .texts import TextTable
from .types import Cost, Pairs, Role

# Form of a score on disk.
_STORED = np.dtype("<f4")
_UNKNOWN = np.array(np.nan, dtype=_STORED).tobytes()


class _Joined(Sequence[TokenSequence]):
    """Inputs of some pairs, joined when the engine reads them: pairs that never reach the engine are never joined."""

    def __init__(
        self,
        layout: PairLayout,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.intp],
        document_at: NDArray[np.intp],
        max_length: int,
    ) -> None:
        self._layout = layout
        self._queries = queries
        self._documents = documents
        self._query_at = query_at
        self._document_at = document_at
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._query_at)

    @overload
    def __getitem__(self, index: int) -> TokenSequence: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenSequence]: ...

    def __getitem__(self, index: int | slice) -> TokenSequence | list[TokenSequence]:
        if isinstance(index, slice):
            return self._join(self._query_at[index], self._document_at[index])
        return self._join(self._query_at[index : index + 1 or None], self._document_at[index : index + 1 or None])[0]

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter(self._join(self._query_at, self._document_at))

    def _join(self, query_at: NDArray[np.intp], document_at: NDArray[np.intp]) -> list[TokenSequence]:
        queries = [self._queries[place] for place in query_at.tolist()]
        documents = [self._documents[place] for place in document_at.tolist()]
        return self._layout.join(queries, documents, self._max_length)


class PairScorer:
    """Scores pairs as token sequences."""

    def __init__(
        self,
        layout: PairLayout,
        texts: TextEncoder,
        scheduler: Scheduler,
        *,
        cache: ScoreCache | None,
        disk: DiskCache | None,
    ) -> None:
        """Set up.

        Args:
            layout: Joins pairs.
            texts: Encodes texts.
            scheduler: Runs sequences.
            cache: Known scores; without it, every pair is looked up on disk or scored.
            disk: Scores of earlier runs; ``None`` if there is no cache on disk.
        """
        self._layout = layout
        self._texts = texts
        self._scheduler = scheduler
        self._cache = cache
        self._disk = disk

    async def score(self, table: TextTable, pairs: Pairs, cost: Cost) -> NDArray[np.float32]:
        """Raw scores of pairs, shape ``(n,)``."""
        query_ids, document_ids = pairs.flat()
        if self._cache is None:
            return await self._recall(table, query_ids, document_ids, cost)
        # An interactive call does not wait for bulk work that has the same pair: it scores the pair itself.
        share = not table.ticket.interactive
        digests = await table.digests()
        scores = np.empty(len(query_ids), dtype=np.float32)
        left = np.arange(len(query_ids))
        claim = await self._cache.claim(table.scope, digests, query_ids, document_ids, share=share)
        cost.cached += len(claim.known)
        while True:
            scores[left[claim.known]] = claim.scores[claim.known]
            mine = left[claim.mine]
            try:
                found = scores[mine]
                if len(mine):
                    found = await self._recall(table, query_ids[mine], document_ids[mine], cost)
                    scores[mine] = found
            except BaseException:
                self._cache.settle(claim, None)
                raise
            await self._cache.settle_in_steps(claim, found)
            if not claim.waits:
                return scores
            await asyncio.wait(claim.waits)
            left = left[claim.waiting]
            claim = await self._cache.claim(table.scope, digests, query_ids[left], document_ids[left], share=share)
            cost.shared += len(claim.known)

    async def _recall(
        self, table: TextTable, query_ids: NDArray[np.int64], document_ids: NDArray[np.int64], cost: Cost
    ) -> NDArray[np.float32]:
        """Raw scores of listed pairs: those on disk, and from the model those that are not."""
        if self._disk is None:
            return await self._compute(table, query_ids, document_ids, cost)
        digests = await table.digests()
        keys = [
            table.scope + digests[query] + digests[document]
            for query, document in zip(query_ids.tolist(), document_ids.tolist(), strict=True)
        ]
        found = await self._disk.get(keys)
        unknown = np.array([position for position, value in enumerate(found) if value is None], dtype=np.intp)
        scores = np.frombuffer(b"".join(value or _UNKNOWN for value in found), dtype=_STORED).astype(np.float32)
        cost.cached += len(found) - len(unknown)
        if len(unknown):
            computed = await self._compute(table, query_ids[unknown], document_ids[unknown], cost)
            scores[unknown] = computed
            data = computed.astype(_STORED).tobytes()
            self._disk.put([keys[one] for one in unknown], [data[at : at + 4] for at in range(0, len(data), 4)])
        return scores

    async def _compute(
        self, table: TextTable, query_ids: NDArray[np.int64], document_ids: NDArray[np.int64], cost: Cost
    ) -> NDArray[np.float32]:
        """Raw scores of listed pairs, from the model."""
        max_length = table.options.max_length
        distinct_queries, query_at = np.unique(query_ids, return_inverse=True)
        queries = await self._texts.encode(table, "query", distinct_queries)
        distinct_documents, document_at = np.unique(document_ids, return_inverse=True)
        documents = await self._texts.encode(table, "document", distinct_documents)
        lengths = self._layout.lengths(queries, documents, query_at, document_at)  # (n,), before truncation
        cut = np.flatnonzero(lengths > max_length)
        if len(cut) and table.options.reject_over_long:
            first = cut[0]
            exact = queries[query_at[first]].exact and documents[document_at[first]].exact
            raise OverLongError(
                f"{len(cut)} of {len(lengths)} pairs are too long; the first, text {query_ids[first]} with text "
                f"{document_ids[first]}, has {'' if exact else 'at least '}{lengths[first]} tokens",
                max_length,
            )
        undecided = self._layout.undecided(queries, documents, query_at, document_at, max_length)
        if undecided.any():
            queries = await self._measure(table, "query", distinct_queries, queries, query_at[undecided])
            documents = await self._measure(table, "document", distinct_documents, documents, document_at[undecided])
        # A query's documents stand next to each other: their common prefix may be in the engine's prefix cache.
        order = np.argsort(query_at, kind="stable")

        def make(positions: NDArray[np.intp]) -> Sequence[TokenSequence]:
            part = order[positions]
            return _Joined(self._layout, queries, documents, query_at[part], document_at[part], max_length)

        job = Job(table.ticket, np.minimum(lengths, max_length)[order], make)
        scores = np.empty(len(lengths), dtype=np.float32)
        result = await self._scheduler.run(job)
        scores[order] = result.values
        cost.add(result)
        cost.truncated += len(cut)
        return scores

    async def _measure(
        self, table: TextTable, role: Role, ids: NDArray[np.int64], encoded: list[EncodedText], at: NDArray[np.intp]
    ) -> list[EncodedText]:
        """Encoded texts with the exact lengths of those at some positions."""
        places = [place for place in np.unique(at).tolist() if not encoded[place].exact]
        lengths = await self._texts.measure(table, role, ids[places])
        exact = dict(zip(places, lengths, strict=True))
        return [
            replace(text, length=exact[place], exact=True) if place in exact else text
            for place, text in enumerate(encoded)
        ]
