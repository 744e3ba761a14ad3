"""EmbeddingMemory: embeddings of the texts that were used last, so that each text is embedded once over the epochs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Embed = Callable[[list[str]], Any]
"""Function from n texts to their embeddings: an array or tensor of shape ``(n, dim)``, of any length."""

_DIGEST_BYTES = 16
# Texts that are embedded in one call, between two looks at whether the choice was cancelled.
_STEP = 256


class EmbeddingMemory:
    """Unit embeddings of texts, the last used ones up to a number. For one thread at a time.

    Embeddings are stored as float16: 2 bytes a dimension and text, 100 MB for 131,072 texts of 384 dimensions. The
    cosines of two of them are exact to some 1e-3.

    Args:
        texts: Most texts to remember, 1 or more.
    """

    def __init__(self, texts: int = 1 << 17) -> None:
        self._most = texts
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # last used last
        self._vectors: NDArray[np.float16] | None = None  # (slots, dim)

    def __len__(self) -> int:
        return len(self._slots)

    def read(
        self, texts: Sequence[str], embed: Embed, kind: str = "", check: Callable[[], None] = lambda: None
    ) -> NDArray[np.float32]:
        """Return the unit embeddings of texts, shape ``(len(texts), dim)``; embed those that are not remembered.

        Args:
            texts: Distinct texts, at least one.
            embed: Embeds texts.
            kind: Name of ``embed``. Embeddings of one text by functions of different names are remembered apart.
            check: Called before each call of ``embed``; may raise an exception, which ends the reading.

        Raises:
            ValueError: ``embed`` returned another number of embeddings, of another dimension, or not finite ones.
        """
        key = blake2b(kind.encode(), digest_size=32).digest()
        keys = [blake2b(text.encode(), digest_size=_DIGEST_BYTES, key=key).digest() for text in texts]
        slots = np.array([self._slots.get(one, -1) for one in keys])
        missing, found = np.flatnonzero(slots < 0), np.flatnonzero(slots >= 0)
        # Copied first, because new embeddings may take the place of old ones.
        known = None if self._vectors is None else self._vectors[slots[found]].astype(np.float32)
        for place in found.tolist():
            self._slots.move_to_end(keys[place])
        parts: list[NDArray[np.float32]] = []
        for begin in range(0, len(missing), _STEP):
            check()
            places = missing[begin : begin + _STEP]
            vectors = _units(embed([texts[place] for place in places]), len(places))
            if self._vectors is not None and self._vectors.shape[1] != vectors.shape[1]:
                raise ValueError(
                    f"The preselector returned embeddings of {vectors.shape[1]} dimensions after embeddings of "
                    f"{self._vectors.shape[1]}; all of them need the same number."
                )
            self._keep([keys[place] for place in places], vectors)
            parts.append(vectors)
        vectors = np.empty((len(texts), (parts[0] if known is None else known).shape[1]), dtype=np.float32)
        if known is not None:
            vectors[found] = known
        if parts:
            vectors[missing] = np.concatenate(parts)
        return vectors

    def _keep(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        for key, vector in zip(keys, vectors, strict=True):
            if len(self._slots) < self._most:
                slot = len(self._slots)
                self._grow(slot + 1, len(vector))
            else:
                _, slot = self._slots.popitem(last=False)
            assert self._vectors is not None
            self._vectors[slot] = vector
            self._slots[key] = slot

    def _grow(self, slots: int, dimensions: int) -> None:
        held = 0 if self._vectors is None else len(self._vectors)
        if slots <= held:
            return
        grown = np.empty((min(max(2 * held, 1024, slots), self._most), dimensions), dtype=np.float16)
        if self._vectors is not None:
            grown[:held] = self._vectors
        self._vectors = grown


def _units(embeddings: Any, count: int) -> NDArray[np.float32]:
    """Check embeddings that a preselector returned, and scale them to unit length, shape ``(count, dim)``."""
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().float().cpu().numpy()
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        raise ValueError(
            f"The preselector returned an array of shape {vectors.shape} for {count} texts; it has to return one "
            f"embedding for each text, shape ({count}, dim)."
        )
    if not np.isfinite(vectors).all():
        raise ValueError("The preselector returned embeddings that are not finite.")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return units
