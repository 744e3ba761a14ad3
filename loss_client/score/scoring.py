"""Scoring of rows: batches of pairs on streams, several in flight, written in the order of the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from loss_client.client.client import RerankerClient
from loss_client.client.options import JobOptions
from loss_client.client.scores import ScoreMatrix
from loss_client.client.turns import ModelPin
from loss_client.score.output import Output
from loss_client.score.pairs import Asked, Columns


@dataclass(slots=True)
class Totals:
    """Counts of a run.

    Attributes:
        rows: Rows that were written.
        pairs: Pairs of distinct texts that were scored, summed over the batches.
        cached_pairs: Of these, pairs whose score the server had in its cache.
        truncated_pairs: Of these, pairs that were truncated to the length limit.
    """

    rows: int = 0
    pairs: int = 0
    cached_pairs: int = 0
    truncated_pairs: int = 0


@dataclass(slots=True)
class _Batch:
    rows: list[Asked] = field(default_factory=list)
    pairs: int = 0
    matrix: ScoreMatrix | None = None  # None while it is not sent, and without pairs


def score_rows(
    client: RerankerClient,
    asked: Iterable[Asked],
    columns: Columns,
    output: Output,
    options: JobOptions,
    *,
    batch_pairs: int,
    in_flight: int,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Totals:
    """Score rows and write them, in their order.

    Memory holds the texts and scores of ``in_flight`` batches. All scores come from one model: the output's, or that of
    the first score.

    Args:
        client: The client.
        asked: The rows.
        columns: Makes a row with scores.
        output: Gets the rows.
        options: Options of the jobs.
        batch_pairs: Pairs of a batch, about; a row is never divided.
        in_flight: Most batches that are sent and not written.
        on_rows: Called after each batch with the number of its rows.

    Raises:
        RerankerError: A batch could not be scored; batches before it are written.
    """
    totals, pin = Totals(), ModelPin(output.fingerprint)
    sent: deque[_Batch] = deque()

    def finish() -> None:
        batch = sent.popleft()
        scores = np.empty(0, np.float32) if batch.matrix is None else batch.matrix.result()[:, 0]
        output.use(pin.fingerprint)
        # The shortest text of a float32 number, without the digits that float64 would add.
        numbers = iter([float(str(score)) for score in scores])
        output.write(columns.scored(one, [next(numbers) for _ in one.documents]) for one in batch.rows)
        totals.rows += len(batch.rows)
        if batch.matrix is not None:
            usage = batch.matrix.usage
            totals.pairs += usage.pairs
            totals.cached_pairs += usage.cached_pairs
            totals.truncated_pairs += usage.truncated_pairs
        on_rows(len(batch.rows))

    try:
        for batch in _batches(asked, batch_pairs):
            _send(client, batch, options, pin)
            sent.append(batch)
            if len(sent) == in_flight:
                finish()
        while sent:
            finish()
    finally:
        for batch in sent:  # after an error or an interrupt, the server would go on
            if batch.matrix is not None:
                batch.matrix.cancel()
    return totals


def _batches(asked: Iterable[Asked], batch_pairs: int) -> Iterator[_Batch]:
    batch = _Batch()
    for one in asked:
        batch.rows.append(one)
        batch.pairs += len(one.documents)
        if batch.pairs >= batch_pairs or len(batch.rows) >= batch_pairs:
            yield batch
            batch = _Batch()
    if batch.rows:
        yield batch


def _send(client: RerankerClient, batch: _Batch, options: JobOptions, pin: ModelPin) -> None:
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    query_ids, document_ids = [], []
    for one in batch.rows:
        for text in one.documents:
            query_ids.append(queries.setdefault(one.query, len(queries)))
            document_ids.append(documents.setdefault(text, len(documents)))
    if query_ids:
        batch.matrix = client.stream_pairs(
            list(queries), list(documents), query_ids, document_ids, recurring=False, pin=pin, **options
        )
