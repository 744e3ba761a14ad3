"""Columns of a grid: deals the chunks of a band so that a stream meets the documents again that it has sent before."""

from __future__ import annotations

from loss_client.client.chunks import Chunk

Band = dict[int, Chunk]
"""The chunks of one band of rows that no stream has taken, by their first columns; the leftmost chunk comes last."""


class Columns:
    """The columns that one stream has had chunks of, in order of the first time.

    From each band of rows the stream takes its own columns first, and then others that are left. In this way a fast
    server takes over columns of a slow one for good, and most documents go to one server only.
    """

    def __init__(self) -> None:
        self._own: list[int] = []
        self._row = -1  # first row of the present band
        self._next = 0  # number of own columns that were looked for in the present band

    def take(self, band: Band) -> Chunk:
        """Remove a chunk from a band, which is not empty, and return it."""
        row = next(reversed(band.values())).row_begin
        if row != self._row:
            self._row, self._next = row, 0
        while self._next < len(self._own):
            own = band.pop(self._own[self._next], None)
            self._next += 1
            if own is not None:
                return own
        column, chunk = band.popitem()
        self._own.append(column)
        self._next += 1
        return chunk
