"""Interning: each distinct text of several columns once, with an id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Interned:
    """Columns of texts with each distinct text once.

    Attributes:
        texts: The distinct texts in order of first appearance.
        ids: For each column the position of each of its texts in ``texts``, shape ``(rows of the column,)``.
    """

    texts: list[str]
    ids: list[NDArray[np.intp]]


def intern(columns: Sequence[Sequence[str]]) -> Interned:
    """Give each distinct text of all columns together one id.

    Order of first appearance matters: rows of scores are then needed in about the order in which they were asked for.
    """
    position: dict[str, int] = {}
    ids = [
        np.fromiter((position.setdefault(text, len(position)) for text in column), dtype=np.intp, count=len(column))
        for column in columns
    ]
    return Interned(list(position), ids)
