"""TextTable: the distinct texts of a job, each with an id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TextTable:
    """The distinct texts of a job.

    Attributes:
        texts: The texts, in order of first appearance; a text's id is its position.
        sizes: The sizes of the texts in UTF-8 bytes.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.sizes: list[int] = []
        self._ids: dict[str, int] = {}

    def add(self, texts: Sequence[str], name: str) -> NDArray[np.int64]:
        """Add the texts that are new, and return the ids of all of them, shape ``(len(texts),)``.

        Args:
            texts: The texts.
            name: The argument's name, for error messages.

        Raises:
            TypeError: ``texts`` is a single string, or one of them is not a string.
            ValueError: A text cannot be written as UTF-8.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError(f"{name} is a single {type(texts).__name__}; it has to be a sequence of strings")
        known = self._ids
        ids = np.empty(len(texts), dtype=np.int64)
        for position, text in enumerate(texts):
            text_id = known.get(text) if isinstance(text, str) else None
            if text_id is None:
                text_id = self._append(text, f"{name}[{position}]")
            ids[position] = text_id
        return ids

    def _append(self, text: str, name: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"{name} is not a string but {type(text).__name__}")
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} cannot be written as UTF-8: {error}") from None
        text_id = self._ids[text] = len(self.texts)
        self.texts.append(text)
        self.sizes.append(size)
        return text_id


def distinct(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return the distinct ids in order of first appearance, and for each of ``ids`` its position among them.

    The positions are None where all ids are distinct already.
    """
    values, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    if len(values) == len(ids):
        return ids, None
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return values[order], rank[inverse.reshape(-1)]
