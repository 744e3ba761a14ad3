"""Pairs of a row: its query, its documents, and the row with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loss_client.rows import Row, RowsError


@dataclass(frozen=True, slots=True)
class Asked:
    """A row and the texts to score.

    Attributes:
        row: The row.
        query: The query.
        documents: The documents.
        single: Whether the row has one document, and so gets one score instead of a list.
    """

    row: Row
    query: str
    documents: tuple[str, ...]
    single: bool = False


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Columns of rows of a query and a document, or of a query and a list of documents.

    Attributes:
        query: Column of the query.
        document: Column of a document or a list of documents. ``None``: ``document``, or ``documents`` in rows without
            it.
        score: Column for the score or the list of scores. ``None``: ``score``, or ``scores`` for a list.
    """

    query: str = "query"
    document: str | None = None
    score: str | None = None

    def read(self, row: Row, number: int) -> Asked:
        """Find the texts of a row.

        Args:
            row: The row.
            number: Its number, from 1, for error messages.

        Raises:
            RowsError: A column is missing, holds no text, or has the name that the score gets.
        """
        name = self.document or ("document" if "document" in row else "documents")
        value = _value(row, name, number)
        single = isinstance(value, str)
        documents = (value,) if single else value
        if not isinstance(documents, (list, tuple)) or not all(isinstance(text, str) for text in documents):
            raise RowsError(f"row {number}: column {name!r} has to hold a text or a list of texts, not {_cut(value)}")
        asked = Asked(row, _text(row, self.query, number), tuple(documents), single)
        if self.score_name(asked) in row:
            raise RowsError(
                f"row {number} has a column {self.score_name(asked)!r} already; choose another with --score-column"
            )
        return asked

    def score_name(self, asked: Asked) -> str:
        """Return the name of the column that holds the scores of a row."""
        return self.score or ("score" if asked.single else "scores")

    def scored(self, asked: Asked, scores: Sequence[float]) -> Row:
        """Return a row with its scores."""
        return {**asked.row, self.score_name(asked): scores[0] if asked.single else list(scores)}


@dataclass(frozen=True, slots=True)
class NegativesColumns:
    """Columns of rows of an anchor, a positive, and mined negatives.

    Attributes:
        anchor: Column of the anchor.
        positive: Column of the positive.
        negatives: Columns of the negatives. A row may have null or an empty text in some of them.
        score: Column for the scores: of the positive, then of each of ``present``.
    """

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    score: str = "scores"

    def present(self, row: Row) -> list[str]:
        """Return the columns in which a row has a negative."""
        return [name for name in self.negatives if row.get(name)]

    def read(self, row: Row, number: int) -> Asked:
        """Find the texts of a row; see ``PairColumns.read``."""
        if self.score in row:
            raise RowsError(f"row {number} has a column {self.score!r} already; choose another with --score-column")
        documents = tuple(_text(row, name, number) for name in (self.positive, *self.present(row)))
        return Asked(row, _text(row, self.anchor, number), documents)

    def scored(self, asked: Asked, scores: Sequence[float]) -> Row:
        """Return a row with its scores."""
        return {**asked.row, self.score: list(scores)}


Columns = PairColumns | NegativesColumns


def _value(row: Row, name: str, number: int) -> object:
    if name not in row:
        raise RowsError(f"row {number} has no column {name!r}; it has {', '.join(map(repr, row))}")
    return row[name]


def _text(row: Row, name: str, number: int) -> str:
    value = _value(row, name, number)
    if not isinstance(value, str):
        raise RowsError(f"row {number}: column {name!r} has to hold a text, not {_cut(value)}")
    return value


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
