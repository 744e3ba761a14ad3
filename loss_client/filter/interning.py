"""Interning: one id for each distinct text of several columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Interned:
    """Columns of texts as ids of the distinct texts.

    Attributes:
        texts: The distinct texts in order of first appearance.
        ids: For each column the positions of its texts in ``texts``, shape ``(rows of the column,)``.
    """

    texts: list[str]
    ids: list[NDArray[np.intp]]


def intern(columns: Sequence[Sequence[str]]) -> Interned:
    """Give each distinct text of all columns together one id, in order of first appearance.

    The order matters: the loss then reads rows of scores in about the order in which they are scored.
    """
    position: dict[str, int] = {}
    ids = [
        np.fromiter((position.setdefault(text, len(position)) for text in column), dtype=np.intp, count=len(column))
        for column in columns
    ]
    return Interned(list(position), ids)
