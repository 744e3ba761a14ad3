"""ScoreMemory: scores that this client keeps, so that a pair that comes again is not asked for again.

Only jobs that list their pairs use it: positives and mined negatives, which come back every epoch, selected candidates,
and calls of ``RemoteCrossEncoder``. Grids do not, because the server's cache holds whole rows. Jobs of a server without
streams do not, because replies of ``RerankBatch`` do not name the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

_DIGEST_BYTES = 16


class ScoreMemory:
    """The scores that one client used last.

    Recurring pairs are kept in preference to all others, which get the space that is left: one pass over the data may
    bring so many others that without the preference no recurring pair would still be there in the next pass.

    Args:
        pairs: Most scores to keep, about 300 bytes each; 0 keeps none.
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self._recurring: LRUCache[bytes, float] = LRUCache(maxsize=pairs)
        self._others: LRUCache[bytes, float] = LRUCache(maxsize=pairs)

    def __len__(self) -> int:
        return len(self._recurring) + len(self._others)

    @property
    def keeps(self) -> bool:
        """Whether scores are kept at all."""
        return self._pairs > 0

    def get(self, keys: Iterable[bytes], recurring: bool) -> NDArray[np.float32]:
        """Return the score of each key, NaN where it is not known, shape ``(keys,)``.

        Args:
            keys: The keys.
            recurring: Whether these pairs are recurring ones, from now on.
        """
        return np.fromiter((self._find(key, recurring) for key in keys), dtype=np.float32)

    def put(self, keys: Iterable[bytes], scores: NDArray[np.float32], recurring: bool) -> None:
        """Keep scores, shape ``(keys,)``; for ``recurring`` see ``get``."""
        for key, score in zip(keys, scores.tolist(), strict=True):
            self._keep(key, score, recurring)

    def _find(self, key: bytes, recurring: bool) -> float:
        score = self._recurring.get(key)
        if score is not None:
            return score
        if not recurring:
            return self._others.get(key, np.nan)
        score = self._others.pop(key, None)
        if score is None:
            return np.nan
        self._keep(key, score, recurring)
        return score

    def _keep(self, key: bytes, score: float, recurring: bool) -> None:
        if recurring:
            self._recurring[key] = score
        elif len(self._recurring) < self._pairs:
            self._others[key] = score
        while len(self) > self._pairs:
            self._others.popitem()


class PairKeys:
    """Keys of a job's pairs in a ``ScoreMemory``: 32 bytes each, two digests of 16 bytes.

    Args:
        scope: The fingerprint of the model and the options; pairs of different scopes have different keys.
        texts: The job's distinct texts.
    """

    def __init__(self, scope: bytes, texts: Sequence[str]) -> None:
        # Hashing the scope to a key of fixed length leaves no way to shift its end into a text.
        key = blake2b(scope, digest_size=32).digest()
        self._digests = [blake2b(text.encode(), digest_size=_DIGEST_BYTES, key=key).digest() for text in texts]

    def of(self, queries: NDArray[np.int64], documents: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the key of each pair, from the positions of its texts, each of shape ``(pairs,)``."""
        for query, document in zip(queries.tolist(), documents.tolist(), strict=True):
            yield self._digests[query] + self._digests[document]
