"""How a job is cut: equal texts become one, and pairs become chunks that name few texts and complete rows in order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Rows that are scored side by side. More would spare ids on the wire, but the first row would be complete later.
_BAND_ROWS = 8


class TextTable:
    """The distinct texts of a job.

    Attributes:
        texts: The texts, in order of first appearance; a text's id is its position.
        sizes: Their sizes in UTF-8 bytes.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.sizes: list[int] = []
        self._ids: dict[str, int] = {}

    def add(self, texts: Sequence[str], name: str) -> NDArray[np.int64]:
        """Take in texts and return their ids, shape ``(len(texts),)``.

        Args:
            texts: The texts.
            name: What the caller calls them; for messages.

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

    The second is None where all ids are distinct already.
    """
    values, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    if len(values) == len(ids):
        return ids, None
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return values[order], rank[inverse.reshape(-1)]


class Chunk(NamedTuple):
    """A block of the matrix that is scored in one go: rows and columns from begin (included) to end (excluded)."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int

    @property
    def pairs(self) -> int:
        """How many scores the block holds."""
        return (self.row_end - self.row_begin) * (self.column_end - self.column_begin)

    def halves(self) -> tuple[Chunk, Chunk]:
        """Cut the block, of two pairs or more, in two across its longer side."""
        row_begin, row_end, column_begin, column_end = self
        if column_end - column_begin >= row_end - row_begin:
            middle = (column_begin + column_end) // 2
            return Chunk(row_begin, row_end, column_begin, middle), Chunk(row_begin, row_end, middle, column_end)
        middle = (row_begin + row_end) // 2
        return Chunk(row_begin, middle, column_begin, column_end), Chunk(middle, row_end, column_begin, column_end)


def grid_chunks(rows: int, columns: int, pairs: int, panel: tuple[int, int] | None = None) -> Iterator[Chunk]:
    """Cut a grid into blocks of at most ``pairs`` pairs, so that rows are complete in order or nearly so.

    Blocks are several rows high: a block of r rows and c columns names r + c texts for r * c pairs.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        pairs: Most pairs of a block, 1 or more.
        panel: Rows and columns that are scored before others are begun; the whole grid by default.
    """
    panel_rows, panel_columns = panel or (rows, columns)
    for top in range(0, rows, panel_rows):
        bottom = min(top + panel_rows, rows)
        for left in range(0, columns, panel_columns):
            yield from _panel_chunks(top, bottom, left, min(left + panel_columns, columns), pairs)


def _panel_chunks(top: int, bottom: int, left: int, right: int, pairs: int) -> Iterator[Chunk]:
    width = right - left
    height = max(min(_BAND_ROWS, math.isqrt(pairs)), pairs // width)
    for row in range(top, bottom, height):
        row_end = min(row + height, bottom)
        parts = math.ceil(width / (pairs // (row_end - row)))
        for part in range(parts):
            yield Chunk(row, row_end, left + width * part // parts, left + width * (part + 1) // parts)


def list_chunks(count: int, pairs: int) -> Iterator[Chunk]:
    """Cut a list of ``count`` pairs, each a row of one column, into pieces of at most ``pairs``."""
    for begin in range(0, count, pairs):
        yield Chunk(begin, min(begin + pairs, count), 0, 1)


def panel_shape(
    row_sizes: NDArray[np.int64], column_sizes: NDArray[np.int64], max_texts: int, max_bytes: int
) -> tuple[int, int]:
    """Choose the rows and columns of a grid whose texts one stream can carry.

    The whole grid where it fits. Otherwise all of the side that takes less than half of the room and as much of the
    other as fits beside it, or half of each: then the texts are sent again as seldom as possible.

    Args:
        row_sizes: Bytes of each row's text, shape ``(rows,)``, not empty.
        column_sizes: Bytes of each column's text, shape ``(columns,)``, not empty.
        max_texts: Texts that a stream takes.
        max_bytes: Bytes of text that a stream takes.
    """
    # The share of a stream's room that each text takes, by count or by bytes, whichever is scarcer over the whole.
    row_share = max(1 / max_texts, float(row_sizes.mean()) / max_bytes)
    column_share = max(1 / max_texts, float(column_sizes.mean()) / max_bytes)
    rows, columns = len(row_sizes), len(column_sizes)
    rows_room = max(1 - columns * column_share, 0.5)
    columns_room = max(1 - rows * row_share, 0.5)
    return (
        max(1, min(rows, math.floor(rows_room / row_share + 1e-9))),
        max(1, min(columns, math.floor(columns_room / column_share + 1e-9))),
    )
