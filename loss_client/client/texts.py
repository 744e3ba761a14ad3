"""TextTable: the distinct texts of a job, each with an id."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

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
        try:
            ids = np.fromiter(map(self._id, texts), dtype=np.int64, count=len(texts))
            new = list(islice(self._ids, len(self.texts), None))
            self.sizes += map(_size, new)
        except (TypeError, UnicodeEncodeError):
            raise _fault(texts, name) from None
        self.texts += new
        return ids

    def _id(self, text: str) -> int:
        return self._ids.setdefault(text, len(self._ids))


def _size(text: str) -> int:
    """Return the size of a text in UTF-8 bytes. Raises ``TypeError`` or ``UnicodeEncodeError``."""
    if not isinstance(text, str):
        raise TypeError
    return len(text) if text.isascii() else len(text.encode())


def _fault(texts: Sequence[str], name: str) -> Exception:
    """Return the error for the first of the texts that cannot be sent."""
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            return TypeError(f"{name}[{position}] is not a string but {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return ValueError(f"{name}[{position}] cannot be written as UTF-8: {error}")
    raise AssertionError("the texts have no fault")


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
