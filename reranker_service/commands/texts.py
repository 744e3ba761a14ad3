"""Texts to measure a server with: random words, or the lines of a file, each with a new number in front."""

from __future__ import annotations

import random
from collections.abc import Sequence

# fmt: off
_WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "by", "with", "as", "from", "at", "which",
    "are", "this", "have", "not", "their", "all", "one", "were", "when", "been", "can", "more", "between", "under",
    "world", "water", "people", "system", "number", "history", "language", "music", "science", "city", "river",
    "family", "government", "energy", "market", "school", "theory", "computer", "animal", "century", "memory",
)
# fmt: on


class NewTexts:
    """Queries and documents that no server has seen before, so that no cache answers.

    Args:
        query_words: Words of a query, 1 or more.
        document_words: Words of a document of random words, 1 or more.
        lines: Texts of a file. Documents are whole lines, queries their first ``query_words`` words.
    """

    def __init__(self, query_words: int, document_words: int, lines: Sequence[str] = ()) -> None:
        self._query_words, self._document_words, self._lines = query_words, document_words, lines
        # Other texts in each run: a server may keep scores on disk.
        self._random = random.Random()

    def queries(self, count: int) -> list[str]:
        """Return ``count`` new queries."""
        if not self._lines:
            return [self._text(self._query_words) for _ in range(count)]
        return [
            " ".join([self._number(), *line.split()[: self._query_words]])
            for line in self._random.choices(self._lines, k=count)
        ]

    def documents(self, count: int) -> list[str]:
        """Return ``count`` new documents."""
        if not self._lines:
            return [self._text(self._document_words) for _ in range(count)]
        return [f"{self._number()} {line}" for line in self._random.choices(self._lines, k=count)]

    def _text(self, words: int) -> str:
        return " ".join([self._number(), *self._random.choices(_WORDS, k=words - 1)])

    def _number(self) -> str:
        return str(self._random.randrange(10**9))
