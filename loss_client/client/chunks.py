"""Chunks: a job's pairs cut into blocks that name few texts and complete the rows of scores in order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STREAM_CHUNK_PAIRS = 128
"""Most pairs of the first and the last chunks of a job whose rows are read as they arrive."""

MOST_CHUNK_PAIRS = 4096
"""Most pairs of the chunks in the middle of a large job.

A chunk costs the client 0.4 ms of processor time and a pair in it 0.05 us: beyond this number little is gained.
"""

# Rows of a chunk. More rows would need fewer ids on the wire, but the first row would be complete later.
_BAND_ROWS = 8
# A chunk that may grow has at most this share of the pairs before it, and of those after it: the first rows arrive as
# early as with small chunks, and the last chunks of a job that several servers share end at about the same time.
_GROWTH = 32


class Chunk(NamedTuple):
    """A block of the matrix that one message asks for: rows and columns from begin (included) to end (excluded)."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int

    @property
    def pairs(self) -> int:
        """Number of scores in the block."""
        return (self.row_end - self.row_begin) * (self.column_end - self.column_begin)

    def halves(self) -> tuple[Chunk, Chunk]:
        """Cut a block of two pairs or more in two, across its longer side."""
        row_begin, row_end, column_begin, column_end = self
        if column_end - column_begin >= row_end - row_begin:
            middle = (column_begin + column_end) // 2
            return Chunk(row_begin, row_end, column_begin, middle), Chunk(row_begin, row_end, middle, column_end)
        middle = (row_begin + row_end) // 2
        return Chunk(row_begin, middle, column_begin, column_end), Chunk(middle, row_end, column_begin, column_end)


class _Sizes:
    """Most pairs of each block of a job: ``pairs`` for the first and the last blocks, up to ``most`` between them."""

    def __init__(self, total: int, pairs: int, most: int | None) -> None:
        self._pairs = pairs
        self._most = max(pairs, most or 0)
        self._total = total

    def of(self, before: int, begin: int | None = None) -> int:
        """Return the most pairs of the next block.

        Args:
            before: Pairs of the job that come before the block.
            begin: Pairs of the job before the band of rows that the block is in; a band is not cut finer at its end.
                Default: ``before``.
        """
        after = self._total - (before if begin is None else begin)
        return max(self._pairs, min(self._most, before // _GROWTH, after // _GROWTH))


def grid_chunks(
    rows: int, columns: int, pairs: int, panel: tuple[int, int] | None = None, *, most: int | None = None
) -> Iterator[Chunk]:
    """Cut a grid into blocks, in an order that completes the first rows first.

    A block has several rows, because r rows and c columns name r + c texts for r * c pairs.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        pairs: Most pairs of a block, 1 or more.
        panel: Numbers of rows and columns of a panel: the grid is cut into panels first, and all blocks of one panel
            come before those of the next. Default: the whole grid is one panel.
        most: Most pairs of the blocks in the middle of a large grid: the first and the last blocks have at most
            ``pairs``, and those between them a limited share of the pairs before and after them. Default: ``pairs``.
    """
    panel_rows, panel_columns = panel or (rows, columns)
    sizes, before = _Sizes(rows * columns, pairs, most), 0
    for top in range(0, rows, panel_rows):
        bottom = min(top + panel_rows, rows)
        for left in range(0, columns, panel_columns):
            right = min(left + panel_columns, columns)
            yield from _panel_chunks(top, bottom, left, right, sizes, before)
            before += (bottom - top) * (right - left)


def _panel_chunks(top: int, bottom: int, left: int, right: int, sizes: _Sizes, before: int) -> Iterator[Chunk]:
    width, row = right - left, top
    while row < bottom:
        pairs = sizes.of(before)
        height = min(max(min(_BAND_ROWS, math.isqrt(pairs)), pairs // width), bottom - row)
        begin, column = before, left
        while column < right:
            parts = math.ceil((right - column) / (sizes.of(before, begin) // height))
            column_end = column + (right - column) // parts
            yield Chunk(row, row + height, column, column_end)
            before += height * (column_end - column)
            column = column_end
        row += height


def list_chunks(count: int, pairs: int, *, most: int | None = None) -> Iterator[Chunk]:
    """Cut a list of ``count`` pairs, each a row of one column, into pieces; for ``most`` see :func:`grid_chunks`."""
    sizes, begin = _Sizes(count, pairs, most), 0
    while begin < count:
        end = min(begin + sizes.of(begin), count)
        yield Chunk(begin, end, 0, 1)
        begin = end


def panel_shape(
    row_sizes: NDArray[np.int64], column_sizes: NDArray[np.int64], max_texts: int, max_bytes: int
) -> tuple[int, int]:
    """Choose how many rows and columns of a grid have texts that one stream can carry.

    The result is the whole grid if it fits. If one side fits into half of the stream, the result is all of that side
    and as much of the other as fits beside it. Otherwise each side gets half of the stream. This choice sends the
    fewest texts more than once.

    Args:
        row_sizes: Bytes of each row's text, shape ``(rows,)``, not empty.
        column_sizes: Bytes of each column's text, shape ``(columns,)``, not empty.
        max_texts: Most texts of a stream.
        max_bytes: Most bytes of text of a stream.
    """
    # Average share of a stream's limit that one text uses: by count or by bytes, whichever share is larger.
    row_share = max(1 / max_texts, float(row_sizes.mean()) / max_bytes)
    column_share = max(1 / max_texts, float(column_sizes.mean()) / max_bytes)
    rows, columns = len(row_sizes), len(column_sizes)
    rows_room = max(1 - columns * column_share, 0.5)
    columns_room = max(1 - rows * row_share, 0.5)
    return (
        max(1, min(rows, math.floor(rows_room / row_share + 1e-9))),
        max(1, min(columns, math.floor(columns_room / column_share + 1e-9))),
    )
