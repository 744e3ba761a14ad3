"""Scores that this client has seen before, so that a pair that comes again is not asked for again.

Only jobs that list their pairs use it: positives and mined negatives that come back every epoch, candidates, calls of a
CrossEncoder's kind. A grid is the server's business, whose cache holds whole rows.
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

    Args:
        pairs: Most scores to keep, about 300 bytes each; 0 keeps none.
    """

    def __init__(self, pairs: int) -> None:
        self._scores: LRUCache[bytes, float] = LRUCache(maxsize=pairs)

    def __len__(self) -> int:
        return len(self._scores)

    @property
    def keeps(self) -> bool:
        """Whether it keeps any."""
        return self._scores.maxsize > 0

    def get(self, keys: Iterable[bytes]) -> NDArray[np.float32]:
        """Look scores up; returns one for each key, NaN where it is not known, shape ``(keys,)``."""
        return np.fromiter((self._scores.get(key, np.nan) for key in keys), dtype=np.float32)

    def put(self, keys: Iterable[bytes], scores: NDArray[np.float32]) -> None:
        """Keep scores, shape ``(keys,)``."""
        for key, score in zip(keys, scores.tolist(), strict=True):
            self._scores[key] = score


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
