"""Progress: the part of a job that has no score yet, kept from one connection to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from loss_client.client.chunks import Chunk, grid_chunks, list_chunks, panel_shape
from loss_client.client.columns import Band, Columns
from loss_client.client.job import Job
from loss_client.client.memory import PairKeys
from reranker.v1 import reranker_pb2 as pb


class Progress:
    """The pairs that a job still has to ask for.

    Every chunk that ``next_chunk`` returns is either answered, with ``take``, or given back, with ``give_back``.

    Attributes:
        pairs: Number of pairs that servers are asked for: all of the job's, less those that the client remembers.
        pairs_left: Of these, how many have no score yet.
        pairs_free: Of these, how many no stream has taken; 0 before ``plan``.
        chunk_pairs: Most pairs of the first planned chunks; 0 before ``plan``.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._queries, self._documents = job.pairs.queries, job.pairs.documents
        self._rows: NDArray[np.intp] | None = None  # the matrix's row of each pair of a list; None: in order
        self._keys: PairKeys | None = None
        self._plan: Iterator[Chunk] | None = None  # chunks that have never been sent, but for those of ``_band``
        self._band: Band = {}  # chunks of the first rows that have never been sent
        self._ahead: Chunk | None = None  # the first chunk behind the band
        self._returned: deque[Chunk] = deque()  # chunks that have to be sent again
        self._fingerprint: str | None = None
        self._broken = 0  # streams that broke and have no successor yet
        self._servers: set[str] = set()  # that sent scores
        self.pairs_free = self.chunk_pairs = 0
        self.pairs = self.pairs_left = self._count()

    def begin_stream(self, fingerprint: str) -> None:
        """Note that a server has opened a stream; at the first one, take the scores that the client remembers.

        Args:
            fingerprint: The model that the server serves; the same for all streams of a job.
        """
        job = self._job
        if self._fingerprint is None and job.memory.keeps and not job.pairs.grid:
            self._recall(fingerprint)
        self._fingerprint = fingerprint
        job.matrix.usage.reconnects += self._broken
        self._broken = 0

    def stream_broke(self) -> None:
        """Note that a stream ended with an error after ``begin_stream``: the next one counts as a reconnect."""
        self._broken += 1

    def plan(self, pairs: int, limits: pb.Limits | None = None, *, most: int | None = None) -> None:
        """Cut the job into chunks, unless an earlier call did.

        Args:
            pairs: Most pairs of a chunk.
            limits: Limits of the stream that carries the chunks. Default: no stream does.
            most: Most pairs of the chunks in the middle of a large job; see ``grid_chunks``. Default: ``pairs``.
        """
        if self._plan is not None:
            return
        self.chunk_pairs, self.pairs_free = pairs, self.pairs_left
        if not self._job.pairs.grid:
            self._plan = list_chunks(len(self._queries), pairs, most=most)
            return
        panel = None
        if limits is not None:
            sizes = np.asarray(self._job.pairs.table.sizes, dtype=np.int64)
            most_texts, most_bytes = limits.max_texts_per_stream, limits.max_text_bytes_per_stream
            panel = panel_shape(sizes[self._queries], sizes[self._documents], most_texts, most_bytes)
        self._plan = grid_chunks(len(self._queries), len(self._documents), pairs, panel, most=most)

    def next_chunk(self, pairs: int, columns: Columns | None = None) -> Chunk | None:
        """Return the next chunk to send; None if there is none. ``plan`` comes first.

        Args:
            pairs: Most pairs of the chunk.
            columns: Columns to prefer among the chunks of the next rows. Default: from left to right.
        """
        if self._returned:
            chunk = self._returned.popleft()
        elif self._band or self._fill_band():
            chunk = self._band.popitem()[1] if columns is None else columns.take(self._band)
        else:
            return None
        while chunk.pairs > pairs:  # this server's limits may be lower than those that the plan was made for
            chunk, rest = chunk.halves()
            self._returned.appendleft(rest)
        self.pairs_free -= chunk.pairs
        return chunk

    def give_back(self, chunks: Iterable[Chunk]) -> None:
        """Put chunks without an answer in front of those that are still to be sent."""
        returned = list(chunks)
        self._returned.extendleft(reversed(returned))
        self.pairs_free += sum(chunk.pairs for chunk in returned)

    def ids(self, chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the text ids of a chunk's queries and documents."""
        queries = self._queries[chunk.row_begin : chunk.row_end]
        if self._job.pairs.grid:
            return queries, self._documents[chunk.column_begin : chunk.column_end]
        return queries, self._documents[chunk.row_begin : chunk.row_end]

    def take(self, chunk: Chunk, scores: NDArray[np.float32], usages: Iterable[pb.Usage], server: str = "") -> None:
        """Hand a chunk's scores to the matrix and the memory.

        Args:
            chunk: The chunk.
            scores: Its scores, shape ``(chunk.pairs,)``.
            usages: The server's counts for these scores.
            server: The server's address. Default: it is not known.
        """
        job = self._job
        rows = slice(chunk.row_begin, chunk.row_end)
        columns = slice(chunk.column_begin, chunk.column_end)
        # The matrix comes last: a reader that wakes up may read the counts, or ask for the same pairs again, at once.
        for usage in usages:
            job.matrix.usage.add(usage)
        self._servers.add(server)
        job.matrix.usage.servers = len(self._servers)
        if self._keys is not None:
            job.memory.put(self._keys.of(*self.ids(chunk)), scores, job.recurring)
        block = scores.reshape(chunk.row_end - chunk.row_begin, chunk.column_end - chunk.column_begin)
        job.matrix.put(rows if self._rows is None else self._rows[rows], columns, block)
        self.pairs_left -= len(scores)

    def describe(self) -> str:
        """Describe the numbers of pairs with and without a score, as the end of an error message."""
        return f"; {self.pairs - self.pairs_left} of {self.pairs} pairs are scored, {self.pairs_left} are left"

    def _fill_band(self) -> bool:
        """Take the chunks of the next rows from the plan; returns whether there are any."""
        assert self._plan is not None
        first = self._ahead or next(self._plan, None)
        if first is None:
            return False
        band, self._ahead = [first], None
        for chunk in self._plan:
            if chunk.row_begin != first.row_begin:
                self._ahead = chunk
                break
            band.append(chunk)
        self._band = {chunk.column_begin: chunk for chunk in reversed(band)}
        return True

    def _recall(self, fingerprint: str) -> None:
        """Take a list's remembered scores, and leave only the other pairs to ask for."""
        job = self._job
        scope = fingerprint.encode() + b"\0" + job.options.SerializeToString(deterministic=True)
        self._keys = PairKeys(scope, job.pairs.table.texts)
        known = job.memory.get(self._keys.of(self._queries, self._documents), job.recurring)
        missing = np.isnan(known)
        rows = np.flatnonzero(~missing)
        if len(rows):
            # Counts before scores, as in ``take``.
            job.matrix.usage.pairs += len(rows)
            job.matrix.usage.client_cached_pairs += len(rows)
            job.matrix.put(rows, slice(0, 1), known[rows, None])
            self._rows = np.flatnonzero(missing)
            self._queries, self._documents = self._queries[missing], self._documents[missing]
        self.pairs = self.pairs_left = self._count()

    def _count(self) -> int:
        return len(self._queries) * (len(self._documents) if self._job.pairs.grid else 1)
