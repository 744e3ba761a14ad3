"""What is scored: grids of real text, cut from the docstrings of installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from examples.docstrings import collect

_PACKAGES = ("numpy", "sklearn", "stdlib", "scipy")
# Bounds in characters that give pairs of about 100 WordPiece tokens.
_QUERY_LEAST = 60
_DOCUMENT_LEAST = 250


@dataclass(frozen=True, slots=True)
class Grid:
    """Every query with every document.

    Attributes:
        queries: The Q queries, all different.
        documents: The D documents, all different.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]

    @property
    def pairs(self) -> int:
        """How many scores it has."""
        return len(self.queries) * len(self.documents)


class Corpus:
    """Real texts; grids are taken from it one after the other, so that no two share a text before it is used up.

    Args:
        pairs: How many docstrings to read; more take longer.
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
        """The next grid of this shape, of pairs of about 100 tokens.

        Raises:
            ValueError: There are not so many different texts.
        """
        return Grid(self._queries.take(queries), self._documents.take(documents))

    def texts(self) -> tuple[str, ...]:
        """All texts, to train a tokenizer on."""
        return (*self._queries.all, *self._documents.all)

    def sized(self, count: int, size: int) -> tuple[str, ...]:
        """``count`` different ASCII texts of ``size`` bytes each, made of documents; at most a million.

        Raises:
            ValueError: ``size`` leaves no room for the number that tells the texts apart.
        """
        if size < 8:
            raise ValueError(f"size is {size}; it has to be 8 or more")
        ascii_only = [text.encode("ascii", "ignore").decode() for text in self._documents.take(16)]
        filling = " ".join(ascii_only) * (1 + size // len(" ".join(ascii_only)))
        return tuple(f"{number:06d} {filling}"[:size] for number in range(count))

    def long(self, count: int, characters: int) -> tuple[str, ...]:
        """``count`` different queries of about ``characters`` characters, each of several documents."""
        made = []
        for _ in range(count):
            text = ""
            while len(text) < characters:
                text += self._documents.take(1)[0] + " "
            made.append(text[:characters].rstrip())
        return tuple(made)


class _Ring:
    """Different texts in a fixed order, taken over and over."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.all = list(dict.fromkeys(texts))
        self._next = self._endless()

    def _endless(self) -> Iterator[str]:
        while True:
            yield from self.all

    def take(self, count: int) -> tuple[str, ...]:
        if count > len(self.all):
            raise ValueError(f"{count} different texts were asked for; there are {len(self.all)}")
        return tuple(islice(self._next, count))
