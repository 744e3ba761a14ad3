"""Job: the distinct pairs to score, how to score them, and the matrix that takes the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_client.client.chunks import MOST_CHUNK_PAIRS
from loss_client.client.memory import ScoreMemory
from loss_client.client.queue import Place
from loss_client.client.scores import ScoreMatrix
from loss_client.client.texts import TextTable, distinct
from loss_client.client.turns import ModelPin
from reranker.v1 import reranker_pb2 as pb

Ids = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The distinct pairs of a job, and which of their scores each cell of the caller's matrix shows.

    Attributes:
        table: The distinct texts.
        queries: Text ids of the queries. Of a grid: one for each stored row of scores. Of a list: one for each pair.
        documents: Text ids of the documents. Of a grid: one for each stored column. Of a list: one for each pair.
        grid: True: every query is paired with every document. False: the i-th query is paired with the i-th document,
            and each pair is a row of a single column.
        shape: Shape of the matrix that the caller reads.
        row_ids: For each row that the caller reads the stored row with its scores. None: the row of the same number.
        column_ids: The same for columns.
    """

    table: TextTable
    queries: NDArray[np.int64]
    documents: NDArray[np.int64]
    grid: bool
    shape: tuple[int, int]
    row_ids: NDArray[np.int64] | None
    column_ids: NDArray[np.int64] | None = None

    @property
    def count(self) -> int:
        """Number of distinct pairs."""
        return len(self.queries) * (len(self.documents) if self.grid else 1)


@dataclass(frozen=True, slots=True)
class Job:
    """Pairs to score and the options to score them with.

    Attributes:
        pairs: The pairs.
        matrix: Takes the scores.
        options: The scoring options, as the server takes them.
        priority: The priority that the server is asked for.
        chunk_pairs: Most pairs of a chunk; None: as many as the server prefers.
        usual_pairs: Most pairs of the first chunks, if neither the caller nor the server names a number. Those in the
            middle of a large job have up to ``MOST_CHUNK_PAIRS``.
        timeout: Seconds without finished work after which the job fails; see ``Patience``.
        stall_timeout: Seconds without a sign of life after which an attempt ends. None: the default of ``Patience``.
        pin: The model that the scores have to come from.
        memory: Scores that this client remembers from earlier jobs; used for lists, not for grids.
        recurring: Whether the memory keeps these pairs in preference to others.
        place: The job's place among the jobs of training steps. None: it begins at once.
    """

    pairs: Pairs
    matrix: ScoreMatrix
    options: pb.RerankOptions
    priority: pb.Priority.ValueType
    chunk_pairs: int | None
    usual_pairs: int
    timeout: float
    stall_timeout: float | None
    pin: ModelPin
    memory: ScoreMemory
    recurring: bool
    place: Place | None

    def pairs_per_chunk(self, preferred: int = 0) -> int:
        """Return the most pairs of the first chunks.

        Args:
            preferred: The number that the server prefers; 0 if it names none.
        """
        return self.chunk_pairs or preferred or self.usual_pairs

    def most_pairs_per_chunk(self, preferred: int = 0) -> int:
        """Return the most pairs of any chunk; see ``pairs_per_chunk``."""
        return self.chunk_pairs or preferred or max(self.usual_pairs, MOST_CHUNK_PAIRS)


def pair_grid(queries: Sequence[str], documents: Sequence[str]) -> Pairs:
    """Pair every query with every document; equal texts are scored once.

    Raises:
        TypeError: An argument is a single string, or holds something else than strings.
        ValueError: A text cannot be written as UTF-8.
    """
    table = TextTable()
    rows, row_ids = distinct(table.add(queries, "queries"))
    columns, column_ids = distinct(table.add(documents, "documents"))
    return Pairs(table, rows, columns, True, (len(queries), len(documents)), row_ids, column_ids)


def pair_list(
    queries: Sequence[str], documents: Sequence[str], query_ids: Ids, document_ids: Ids, bands: Ids | None = None
) -> Pairs:
    """Pair queries and documents by position; equal pairs are scored once, and pairs of one query are neighbours.

    Args:
        queries: The queries.
        documents: The documents.
        query_ids: For each pair the position of its query.
        document_ids: For each pair the position of its document.
        bands: For each pair the number of its band, 0 or more. The pairs of a lower band come first, and those of one
            query are neighbours within each band. An equal pair belongs to the band of its first occurrence. Default:
            all pairs are in one band.

    Raises:
        IndexError: A position is out of range.
        TypeError: A list of texts is a single string, or holds something else than strings.
        ValueError: A text cannot be written as UTF-8, or there are not as many query as document positions or bands.
    """
    table = TextTable()
    query_texts = table.add(queries, "queries")[_positions("query_ids", query_ids, len(queries))]
    document_texts = table.add(documents, "documents")[_positions("document_ids", document_ids, len(documents))]
    if len(query_texts) != len(document_texts):
        raise ValueError(f"{len(query_texts)} query_ids and {len(document_texts)} document_ids: each pair needs both")
    texts = max(len(table.texts), 1)
    pair_codes = query_texts * texts + document_texts
    codes, row_ids = distinct(pair_codes)
    # Neighbours with one query reach the model together and share its prefix cache.
    order = _grouped(codes // texts)
    if bands is not None:
        if len(bands) != len(pair_codes):
            raise ValueError(f"{len(bands)} bands for {len(pair_codes)} pairs: each pair needs one")
        first = np.sort(np.unique(pair_codes, return_index=True)[1])  # of each distinct pair, in the order of ``codes``
        order = order[np.argsort(np.asarray(bands)[first][order], kind="stable")]
    codes = codes[order]
    if row_ids is None:
        row_ids = np.arange(len(order))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Pairs(table, codes // texts, codes % texts, False, (len(query_texts), 1), place[row_ids])


def _positions(name: str, ids: Ids, count: int) -> NDArray[np.int64]:
    positions = np.asarray(ids, dtype=np.int64).reshape(-1)
    if len(positions) and not 0 <= positions.min() <= positions.max() < count:
        raise IndexError(f"{name} reach from {positions.min()} to {positions.max()}, but there are {count} texts")
    return positions


def _grouped(values: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return an order that puts equal values next to each other, in order of first appearance."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(first[inverse.reshape(-1)], kind="stable")
