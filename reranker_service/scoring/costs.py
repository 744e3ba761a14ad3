"""Costs: bytes that texts, their token ids and embeddings, and pairs in flight take up in the server.

Each figure is an upper bound: objects were measured with tracemalloc in CPython 3.11, and rounded up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .types import Pairs, ScoringOptions

# A text beside its characters: places in lists, and its digest.
_TEXT_BYTES = 160
# One role of a text beside token ids and vector: two small objects, an array, places in dictionaries.
_ROLE_BYTES = 480
_TOKEN_BYTES = 4
# A text has no more tokens than bytes in UTF-8, and at most two of those for a byte of the string object.
_TOKENS_A_BYTE = 2
_RESULT_BYTES = 160
# A pair in flight: ids, lengths and positions in arrays, its place in the cache's table of pairs in flight, its score.
_PAIR_BYTES = 256
# A chunk in flight beside its pairs: a task with its coroutines, futures, small arrays, and its message.
_CHUNK_BYTES = 12 << 10


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes that the work of a call takes up.

    Attributes:
        embedding_bytes: Size of the vector of a text; 0 for models that read pairs.
    """

    embedding_bytes: int = 0

    def pairs(self, count: int) -> int:
        """Bytes of a chunk or ranking of ``count`` pairs while it is in flight."""
        return _CHUNK_BYTES + _PAIR_BYTES * count

    def ranking(self, query: str, documents: Sequence[str], instruction: str, max_length: int) -> int:
        """Bytes of a whole ranking: texts, token ids, embeddings, pairs and results."""
        sizes = [sys.getsizeof(query), *map(sys.getsizeof, documents)]
        tokens = len(instruction.encode()) + sum(min(_TOKENS_A_BYTE * size, max_length) for size in sizes)
        each = _TEXT_BYTES + _ROLE_BYTES + self.embedding_bytes + _RESULT_BYTES
        return sum(sizes) + each * len(sizes) + _TOKEN_BYTES * tokens + self.pairs(len(documents))


class TableCosts:
    """Costs of the texts of one table, which grows: each text once, and its token ids once in each role."""

    def __init__(self, costs: Costs, options: ScoringOptions) -> None:
        self._costs = costs
        self._max_length = options.max_length
        # The instruction's tokens are part of each query's.
        self._instruction = _TOKEN_BYTES * len((options.instruction or "").encode())
        self._count = 0
        self._tokens = np.empty(1, dtype=np.int32)  # bound of each text's tokens
        self._encoded = np.zeros((2, 1), dtype=bool)  # whether each text is charged as query, as document

    def add(self, texts: Sequence[str]) -> int:
        """Add texts; returns their bytes without token ids."""
        count = self._count + len(texts)
        if count > len(self._tokens):
            more = max(count, 2 * len(self._tokens)) - len(self._tokens)
            self._tokens = np.concatenate((self._tokens, np.empty(more, dtype=np.int32)))
            self._encoded = np.concatenate((self._encoded, np.zeros((2, more), dtype=bool)), axis=1)
        sizes = np.fromiter(map(sys.getsizeof, texts), dtype=np.int64, count=len(texts))
        self._tokens[self._count : count] = np.minimum(_TOKENS_A_BYTE * sizes, self._max_length)
        self._count = count
        return int(sizes.sum()) + _TEXT_BYTES * len(texts)

    def encoded(self, pairs: Pairs) -> int:
        """Bytes of token ids and embeddings that pairs add: of texts that were in no earlier pair in the same role."""
        added = 0
        for role, ids in enumerate((pairs.query_ids, pairs.document_ids)):
            new: NDArray[np.int64] = np.unique(ids[~self._encoded[role, ids]])
            each = _ROLE_BYTES + self._costs.embedding_bytes + (self._instruction if role == 0 else 0)
            added += len(new) * each + _TOKEN_BYTES * int(self._tokens[new].sum())
        return added

    def keep(self, pairs: Pairs) -> None:
        """Note that the bytes of ``encoded`` are charged."""
        self._encoded[0, pairs.query_ids] = True
        self._encoded[1, pairs.document_ids] = True
