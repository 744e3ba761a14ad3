"""Which pairs are to be scored, as ids into a text table: a grid or a list."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs over a text table.

    Attributes:
        query_ids: Text ids, int64; shape ``(Q,)`` for a grid, ``(n,)`` for a list.
        document_ids: Text ids, int64; shape ``(D,)`` for a grid, ``(n,)`` for a list.
        grid: Whether every query goes with every document, row-major; else position i pairs with position i.
    """

    query_ids: NDArray[np.int64]
    document_ids: NDArray[np.int64]
    grid: bool

    def __len__(self) -> int:
        return len(self.query_ids) * (len(self.document_ids) if self.grid else 1)

    def flat(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Query ids and document ids pair by pair, each of shape ``(n,)``."""
        if not self.grid:
            return self.query_ids, self.document_ids
        return np.repeat(self.query_ids, len(self.document_ids)), np.tile(self.document_ids, len(self.query_ids))
