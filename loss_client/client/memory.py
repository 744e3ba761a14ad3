"""Scores that this client has seen before, so that a pair that comes again is not asked for again.

Only jobs that list their pairs use it: positives and mined negatives that come back every epoch, candidates, calls of a
CrossEncoder's kind. A grid is the server's business, whose cache holds whole rows. So is a job of a server without
streams, whose replies do not say which model gave them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

_DIGEST_BYTES = 16


class ScoreMemory:
    """The last scores of one client, those that were used longest ago forgotten first.

    A pair is found again only under the same scope: the fingerprint of the model that scored it, and the options.
    Pairs that will recur are kept before all others, which have the room that is left: in one pass over the data there
    may be so many of these that none would still be there when it comes again.

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
        """Whether it keeps any."""
        return self._pairs > 0

    def get(self, keys: Iterable[bytes], recurring: bool) -> NDArray[np.float32]:
        """Look scores up; returns one for each key, NaN where it is not known, shape ``(keys,)``.

        Args:
            keys: The keys.
            recurring: Whether these pairs will recur; counts from now on.
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


def digests(scope: bytes, texts: Sequence[str]) -> list[bytes]:
    """For each text a digest that depends on the scope, too.

    Two digests make the key of a pair: 32 bytes that no two pairs share, by all that is known of the hash.

    Args:
        scope: What else the score depends on.
        texts: The texts.
    """
    # Hashing the scope to a key of fixed length leaves no way to shift its end into a text.
    key = blake2b(scope, digest_size=32).digest()
    return [blake2b(text.encode(), digest_size=_DIGEST_BYTES, key=key).digest() for text in texts]
