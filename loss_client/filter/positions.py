"""Positions: the places of each id in an array, found for many ids at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Positions:
    """Places of ids in an array.

    Args:
        ids: Ids, 0 or more, shape ``(places,)``.
        count: A number that is above all ids.
    """

    def __init__(self, ids: NDArray[np.intp], count: int) -> None:
        self._places = np.argsort(ids, kind="stable")
        self._counts = np.bincount(ids, minlength=count)
        self._starts = np.cumsum(self._counts) - self._counts

    def of(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return (position in ``ids``, place) for every place of each of ``ids``, in the order of ``ids``."""
        counts = self._counts[ids]
        which = np.repeat(np.arange(len(ids)), counts)
        within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        return which, self._places[np.repeat(self._starts[ids], counts) + within]
