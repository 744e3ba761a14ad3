"""Choice of the pairs of a batch to score: those with the largest lead over the anchor's own positive.

The lead of a pair is the preselector's similarity of anchor and document, less that of the anchor and its own positive.
A reranker that agrees with the preselector masks the pairs whose lead is above minus the margin. The order is one for
the whole batch: most masks lie in few rows, so that a fixed number for each row would miss most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loss_client.filter.interning import intern
from loss_client.filter.nearest.cancellation import Cancellation
from loss_client.filter.nearest.preselector import Preselector, Similarities

BANDS = 4
"""Number of parts, of falling lead, in which the chosen pairs are scored one after the other."""

# Similarities that are compared at a time: 16 MiB.
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Side:
    """Queries of a batch's rows, and the documents that may be chosen for them.

    Attributes:
        queries: One query for each row.
        own: Columns of documents, each with one for each row, that are not chosen for that row's query. Of the first
            side, the first column has the positives.
        documents: Documents that may be chosen.
        known: Documents that are not chosen, though they may be among ``documents``.
    """

    queries: Sequence[str]
    own: Sequence[Sequence[str]]
    documents: Sequence[str]
    known: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """Distinct pairs of texts to score: the chosen ones by falling lead, then random ones.

    Attributes:
        queries: The texts of all queries.
        documents: The texts of all documents.
        query_ids: For each pair the position of its query.
        document_ids: For each pair the position of its document.
        leads: The lead of each chosen pair, falling, shape ``(chosen,)``.
        pairs: Number of distinct pairs of the first side that could have been chosen. The random pairs were drawn among
            these, whether chosen or not.
    """

    queries: list[str]
    documents: list[str]
    query_ids: NDArray[np.int64]
    document_ids: NDArray[np.int64]
    leads: NDArray[np.float32]
    pairs: int

    def bands(self) -> NDArray[np.int64]:
        """Return the band of each pair, 0 for the largest leads and for random pairs, shape ``(pairs,)``."""
        chosen, drawn = len(self.leads), len(self.query_ids) - len(self.leads)
        return np.concatenate([np.arange(chosen) * BANDS // max(chosen, 1), np.zeros(drawn, dtype=np.int64)])


class Best:
    """The pairs with the largest leads among those that were added. A pair's code is ``query * documents + document``.

    Args:
        count: Most pairs to keep.
        documents: Number of all documents.
    """

    def __init__(self, count: int, documents: int) -> None:
        self._count = count
        self._documents = documents
        self._codes: list[NDArray[np.int64]] = []
        self._leads: list[NDArray[np.float32]] = []
        self._held = 0
        self._limit = np.float32(-np.inf)  # pairs with a lead up to this one are not needed

    def add(self, leads: NDArray[np.float32], query: int, document: int) -> None:
        """Add pairs of consecutive queries and documents.

        Args:
            leads: Shape ``(queries, documents)``; -inf for a pair that may not be chosen.
            query: Number of the first query.
            document: Number of the first document.
        """
        if not self._count:
            return
        above = leads > self._limit
        if (found := np.count_nonzero(above)) > 2 * self._count:
            # Most of the first pairs: their positions would take more memory and time than their leads.
            held = leads[above]
            above = leads >= np.partition(held, found - self._count)[found - self._count]
        lines, places = np.nonzero(above)
        self._codes.append((lines + query) * self._documents + places + document)
        self._leads.append(leads[lines, places])
        self._held += len(lines)
        if self._held > 2 * self._count:
            self._cut()

    def _cut(self) -> None:
        codes, leads = np.concatenate(self._codes), np.concatenate(self._leads)
        if len(codes) > self._count:
            kept = np.argpartition(leads, len(leads) - self._count)[-self._count :]
            codes, leads = codes[kept], leads[kept]
            self._limit = leads.min()
        self._codes, self._leads, self._held = [codes], [leads], len(codes)

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (codes, leads) of the pairs, largest lead first; of equal leads the lower code first."""
        if not self._codes:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        self._cut()
        order = np.lexsort((self._codes[0], -self._leads[0]))
        return self._codes[0][order], self._leads[0][order]


class _Laid:
    """A side with distinct texts.

    Attributes:
        queries: The distinct queries.
        documents: The distinct documents, with those that may not be chosen.
    """

    def __init__(self, side: Side) -> None:
        queries, documents = intern([side.queries]), intern([*side.own, side.documents, side.known])
        self.queries, self.documents = queries.texts, documents.texts
        self._query_of = queries.ids[0]  # (rows,)
        self._own = documents.ids[: len(side.own)]  # for each column (rows,)
        self._may = np.zeros(len(documents.texts), dtype=np.bool_)
        self._may[documents.ids[-2]] = True
        self._may[documents.ids[-1]] = False

    def add(self, best: Best, query: int, document: int, similar: Similarities, own: NDArray[np.float32]) -> None:
        """Add the leads of all pairs to ``best``.

        Args:
            best: Takes the pairs.
            query: Number of this side's first query among those of all sides.
            document: The same for documents.
            similar: Similarities of this side's queries and documents.
            own: Similarity of each row's anchor and positive, shape ``(rows,)``. NaN where it is not known yet: it is
                filled in, because this side has the anchors.
        """
        step = max(1, _BLOCK // len(self.documents))
        for begin in range(0, len(self.queries), step):
            end = min(begin + step, len(self.queries))
            leads = similar.rows(begin, end)
            rows = np.flatnonzero((self._query_of >= begin) & (self._query_of < end))
            lines = self._query_of[rows] - begin
            if np.isnan(own[rows]).any():
                own[rows] = leads[lines, self._own[0][rows]]
            # Rows with one query share its pairs, which matter as soon as they matter to one of the rows.
            least = np.full(end - begin, np.inf, dtype=np.float32)
            np.minimum.at(least, lines, own[rows])
            leads -= least[:, None]
            leads[:, ~self._may] = -np.inf
            for column in self._own:
                leads[lines, column[rows]] = -np.inf
            best.add(leads, query, document)

    def draw(self, most: int, generator: np.random.Generator) -> tuple[int, NDArray[np.intp], NDArray[np.intp]]:
        """Return (number of pairs that may be chosen, queries of some random ones of them, their documents)."""
        documents = len(self.documents)
        own = np.unique(np.concatenate([self._query_of * documents + column for column in self._own]))
        own = own[self._may[own % documents]]
        may = np.flatnonzero(self._may)
        pairs = len(self.queries) * len(may) - len(own)
        # Twice as many as needed, because some may be drawn twice or may not be chosen.
        drawn = generator.integers(len(self.queries), size=2 * most) * documents
        drawn = np.unique(drawn + may[generator.integers(len(may), size=2 * most)]) if len(may) else drawn[:0]
        drawn = generator.permutation(np.setdiff1d(drawn, own))[:most]
        return pairs, drawn // documents, drawn % documents


def choose(
    preselector: Preselector | None,
    sides: Sequence[Side],
    count: int,
    drawn: int,
    generator: np.random.Generator,
    cancellation: Cancellation,
) -> Choice:
    """Choose pairs of a batch.

    Args:
        preselector: Compares texts. Without one no pair is chosen.
        sides: The first has the anchors. A second one has the positives as queries.
        count: Most pairs to choose.
        drawn: Most random pairs of the first side to draw.
        generator: Draws them.
        cancellation: Ends the choice early.

    Raises:
        JobCancelledError: The choice was cancelled.
    """
    laid = [_Laid(side) for side in sides]
    queries = [text for side in laid for text in side.queries]
    documents = [text for side in laid for text in side.documents]
    best, query, document = Best(count, len(documents)), 0, 0
    own = np.full(len(sides[0].queries), np.nan, dtype=np.float32)
    for side in laid:
        if preselector is None:
            break
        cancellation.check()
        similar = preselector.compare(side.queries, side.documents, cancellation)
        side.add(best, query, document, similar, own)
        query, document = query + len(side.queries), document + len(side.documents)
    codes, leads = best.result()
    pairs, drawn_queries, drawn_documents = laid[0].draw(drawn, generator)
    return Choice(
        queries=queries,
        documents=documents,
        query_ids=np.concatenate([codes // len(documents), drawn_queries]),
        document_ids=np.concatenate([codes % len(documents), drawn_documents]),
        leads=leads,
        pairs=pairs,
    )
