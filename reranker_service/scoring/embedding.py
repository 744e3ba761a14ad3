"""Raw scores of bi-encoders: each text is embedded once, and a grid is one matrix product."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from ..models import TextLayout
from ..scheduling import Job, Scheduler
from .cache import EmbeddingCache
from .disk import DiskCache
from .encoding import TextEncoder
from .errors import OverLongError
from .texts import Embedding, TextTable
from .types import Cost, Pairs, Role


class EmbeddingScorer:
    """Scores pairs as cosines or dot products of embeddings."""

    def __init__(
        self,
        layout: TextLayout,
        texts: TextEncoder,
        scheduler: Scheduler,
        *,
        cache: EmbeddingCache | None,
        disk: DiskCache | None,
        cosines: bool = True,
    ) -> None:
        """Set up.

        Args:
            layout: Adds special tokens.
            texts: Encodes texts.
            scheduler: Runs sequences.
            cache: Known embeddings; without it, every text is looked up on disk or embedded.
            disk: Embeddings of earlier runs; ``None`` if there is no cache on disk.
            cosines: Whether embeddings have norm 1, so that their dot products are cosines.
        """
        self._layout = layout
        self._texts = texts
        self._scheduler = scheduler
        self._cache = cache
        self._disk = disk
        self._cosines = cosines

    async def score(self, table: TextTable, pairs: Pairs, cost: Cost) -> NDArray[np.float32]:
        """Cosines or dot products of pairs, shape ``(n,)``."""
        if table.options.reject_over_long:
            await self._refuse_over_long(table, "query", pairs.query_ids)
            await self._refuse_over_long(table, "document", pairs.document_ids)
        queries, documents = await asyncio.gather(
            self._embed(table, "query", pairs.query_ids, cost), self._embed(table, "document", pairs.document_ids, cost)
        )
        left = np.stack([query.vector for query in queries])  # (Q or n, dim)
        right = np.stack([document.vector for document in documents])  # (D or n, dim)
        scores = (left @ right.T).ravel() if pairs.grid else np.einsum("ij,ij->i", left, right)
        combine_or, combine_and = (
            (np.logical_or.outer, np.logical_and.outer) if pairs.grid else (np.logical_or, np.logical_and)
        )
        cut = combine_or([one.truncated for one in queries], [one.truncated for one in documents])
        known = combine_and([one.known for one in queries], [one.known for one in documents])
        cost.truncated += int(np.count_nonzero(cut & ~known))
        cost.cached += int(np.count_nonzero(known))
        # Rounding can make the cosine of equal texts slightly larger than 1.
        return np.clip(scores, -1.0, 1.0, out=scores) if self._cosines else scores

    async def _refuse_over_long(self, table: TextTable, role: Role, ids: NDArray[np.int64]) -> None:
        """Raise ``OverLongError`` if a text is over-long.

        This check is separate from embedding, because other chunks may wait for the same embeddings.
        """
        max_length, distinct = table.options.max_length, np.unique(ids)
        encoded = await self._texts.encode(table, role, distinct)
        cut = [one for one, text in zip(distinct, encoded, strict=True) if self._layout.single(text, max_length)[1]]
        if cut:
            raise OverLongError(f"{len(cut)} texts are too long; the first is text {cut[0]}", max_length)

    async def _embed(self, table: TextTable, role: Role, ids: NDArray[np.int64], cost: Cost) -> list[Embedding]:
        async def compute(missing: list[int]) -> list[Embedding]:
            if self._cache is None:
                return await self._recall(table, role, missing, cost)
            scope, digests = self._scope(table, role), await table.digests()
            known = {one: entry for one in missing if (entry := self._cache.get(scope, digests[one])) is not None}
            unknown = [one for one in missing if one not in known]
            computed = dict(zip(unknown, await self._recall(table, role, unknown, cost), strict=True))
            for one, embedding in computed.items():
                self._cache.put(scope, digests[one], embedding.vector, embedding.truncated)
            return [computed[one] if one in computed else Embedding(*known[one], known=True) for one in missing]

        return await table.embedded[role].get(ids, compute)

    @staticmethod
    def _scope(table: TextTable, role: Role) -> bytes:
        """Scope of cache keys. Prompts differ between the two roles, and so do the embeddings of a text."""
        return table.scope + role.encode()

    async def _recall(self, table: TextTable, role: Role, ids: list[int], cost: Cost) -> list[Embedding]:
        """Embeddings of texts: those on disk, and from the model those that are not."""
        if self._disk is None or not ids:
            return await self._compute(table, role, ids, cost)
        digests = await table.digests()
        keys = {one: self._scope(table, role) + digests[one] for one in ids}
        found = dict(zip(ids, await self._disk.get(list(keys.values())), strict=True))
        unknown = [one for one in ids if found[one] is None]
        computed = dict(zip(unknown, await self._compute(table, role, unknown, cost), strict=True))
        self._disk.put([keys[one] for one in unknown], [_to_bytes(computed[one]) for one in unknown])
        return [computed[one] if (data := found[one]) is None else _from_bytes(data) for one in ids]

    async def _compute(self, table: TextTable, role: Role, ids: list[int], cost: Cost) -> list[Embedding]:
        if not ids:
            return []
        max_length = table.options.max_length
        encoded = await self._texts.encode(table, role, np.array(ids))
        sequences, cut = zip(*(self._layout.single(text, max_length) for text in encoded), strict=True)
        lengths = np.array([len(sequence.ids) for sequence in sequences])
        job = Job(table.ticket, lengths, lambda positions: [sequences[one] for one in positions])
        result = await self._scheduler.run(job)
        cost.add(result)
        # Copies, because a cached view of one vector would keep the vectors of all texts in memory.
        return [Embedding(vector.copy(), was_cut) for vector, was_cut in zip(result.values, cut, strict=True)]


def _to_bytes(embedding: Embedding) -> bytes:
    """Form of an embedding on disk: one byte for whether its text was truncated, then the vector."""
    return bytes([embedding.truncated]) + embedding.vector.astype("<f4").tobytes()


def _from_bytes(data: bytes) -> Embedding:
    return Embedding(np.frombuffer(data, dtype="<f4", offset=1).astype(np.float32), bool(data[0]), known=True)
