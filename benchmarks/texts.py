"""Corpus: grids of real queries and documents, taken from the docstrings of installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from examples.docstrings import collect

_PACKAGES = ("numpy", "sklearn", "stdlib", "scipy")
# Least lengths in characters; with them, pairs have about 100 WordPiece tokens.
_QUERY_LEAST = 60
_DOCUMENT_LEAST = 250


@dataclass(frozen=True, slots=True)
class Grid:
    """Pairs of every query with every document.

    Attributes:
        queries: Q different queries.
        documents: D different documents.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.queries) * len(self.documents)


class Corpus:
    """Real queries and documents. Successive grids share no text until the corpus is used up; then it starts again.

    Args:
        pairs: Number of docstrings to read.
    """

    def __init__(self, pairs: int = 3_000) -> None:
        found = [
            pair
            for pair in collect(pairs, _PACKAGES)
            if len(pair.summary) >= _QUERY_LEAST and len(pair.body) >= _DOCUMENT_LEAST
        ]
        self._queries = _Ring([pair.summary for pair in found])
        self._documents = _Ring([pair.body for pair in found])

    def grid(self, queries: int, documents: int) -> Grid:
        """Return the next grid of this shape; its pairs have about 100 tokens.

        Raises:
            ValueError: The corpus has fewer different queries or documents.
        """
        return Grid(self._queries.take(queries), self._documents.take(documents))

    def texts(self) -> tuple[str, ...]:
        """Return all queries and documents, to train a tokenizer on."""
        return (*self._queries.all, *self._documents.all)

    def sized(self, count: int, size: int) -> tuple[str, ...]:
        """Return ``count`` (at most a million) different ASCII texts of ``size`` bytes each, made of documents.

        Raises:
            ValueError: ``size`` is below 8, too small for the number that makes the texts different.
        """
        if size < 8:
            raise ValueError(f"size is {size}; it must be at least 8")
        ascii_only = [text.encode("ascii", "ignore").decode() for text in self._documents.take(16)]
        filling = " ".join(ascii_only) * (1 + size // len(" ".join(ascii_only)))
        return tuple(f"{number:06d} {filling}"[:size] for number in range(count))

    def long(self, count: int, characters: int) -> tuple[str, ...]:
        """Return ``count`` different queries of about ``characters`` characters, each made of several documents."""
        made = []
        for _ in range(count):
            text = ""
            while len(text) < characters:
                text += self._documents.take(1)[0] + " "
            made.append(text[:characters].rstrip())
        return tuple(made)


class _Ring:
    """Different texts in a fixed order; after the last one, the first one is taken again."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.all = list(dict.fromkeys(texts))
        self._next = self._endless()

    def _endless(self) -> Iterator[str]:
        while True:
            yield from self.all

    def take(self, count: int) -> tuple[str, ...]:
        if count > len(self.all):
            raise ValueError(f"{count} different texts were requested, but the corpus has {len(self.all)}")
        return tuple(islice(self._next, count))
