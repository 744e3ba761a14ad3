"""Texts to measure a server with: random words of given lengths, or rows of a training set."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from loss_client.plan.wire import Texts

# fmt: off
_WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "by", "with", "as", "from", "at", "which",
    "are", "this", "have", "not", "their", "but", "all", "one", "were", "when", "been", "can", "more", "between",
    "under", "first", "world", "water", "people", "system", "number", "history", "language", "music", "science",
    "city", "river", "family", "government", "energy", "market", "school", "theory", "computer", "experiment",
    "animal", "century", "memory", "weather", "network", "question", "answer", "machine", "surface", "protein",
    "colour", "journey", "village", "mountain", "contract", "measure", "region", "army", "temperature",
)
# fmt: on
_SAMPLED_ROWS = 4096


class TextSource(Protocol):
    """Source of queries and documents that no server has seen before, so that no cache answers."""

    def queries(self, count: int) -> list[str]:
        """Return ``count`` new queries."""
        ...

    def documents(self, count: int) -> list[str]:
        """Return ``count`` new documents."""
        ...

    def sizes(self) -> Texts:
        """Return the mean sizes of the texts of the training set."""
        ...


class RandomWords:
    """Implements ``TextSource`` with random English words.

    Args:
        query_words: Words of a query, 1 or more.
        document_words: Words of a document, 1 or more.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, query_words: int, document_words: int) -> None:
        for name, words in (("query_words", query_words), ("document_words", document_words)):
            if words < 1:
                raise ValueError(f"{name} is {words}; it has to be 1 or more")
        self._lengths = query_words, document_words
        # Other words in each run: a server may keep scores on disk.
        self._random = random.Random()

    def queries(self, count: int) -> list[str]:
        """See ``TextSource``."""
        return [self._text(self._lengths[0]) for _ in range(count)]

    def documents(self, count: int) -> list[str]:
        """See ``TextSource``."""
        return [self._text(self._lengths[1]) for _ in range(count)]

    def sizes(self) -> Texts:
        """See ``TextSource``."""
        word = sum(map(len, _WORDS)) / len(_WORDS) + 1
        return Texts(*(words * word - 1 for words in self._lengths))

    def _text(self, words: int) -> str:
        if words < 6:  # too few for texts that all differ
            return " ".join([_number(self._random), *self._random.choices(_WORDS, k=words - 1)])
        return " ".join(self._random.choices(_WORDS, k=words))


class Rows:
    """Implements ``TextSource`` with the texts of a training set, each with a new number in front.

    Args:
        rows: Rows of two texts or more: the query, then its documents.
        count: Rows of the whole training set.

    Attributes:
        count: See above.
        columns: Texts of a row.
    """

    def __init__(self, rows: Sequence[Sequence[str]], count: int) -> None:
        self.count, self.columns = count, len(rows[0])
        self._random = random.Random()
        self._queries = [row[0] for row in rows]
        self._documents = [text for row in rows for text in row[1:]]

    def queries(self, count: int) -> list[str]:
        """See ``TextSource``."""
        return self._take(self._queries, count)

    def documents(self, count: int) -> list[str]:
        """See ``TextSource``."""
        return self._take(self._documents, count)

    def sizes(self) -> Texts:
        """See ``TextSource``."""
        sides = (self._queries, self._documents)
        return Texts(*(sum(len(text.encode()) for text in side) / len(side) for side in sides))

    def _take(self, texts: Sequence[str], count: int) -> list[str]:
        return [f"{_number(self._random)} {text}" for text in self._random.choices(texts, k=count)]


def _number(generator: random.Random) -> str:
    return str(generator.randrange(10**9))


def read_rows(path: Path) -> Rows:
    """Read rows from a file of JSON lines, or from a directory that ``datasets`` saved; keep a sample of them.

    The columns of text count, in the order of the first row: the query first, then its documents.

    Raises:
        ValueError: The file cannot be read, or has no rows of two texts.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; it has to be a file of JSON lines, or a directory of a data set")
    if path.is_dir():
        return _read_directory(path)
    try:
        with path.open(encoding="utf-8") as lines:
            sample, count = _sampled(line for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for line in sample:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: {_cut(line)} is no JSON object: {error}") from None
    return _checked(path, rows, count)


def _read_directory(path: Path) -> Rows:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(f"{path} is a directory: install datasets to read it, or give a file of JSON lines") from None
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} was not saved by datasets: {error}") from None
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"{path} holds several data sets: {', '.join(found)}; give the directory of one of them")
    count = len(found)
    chosen = random.Random(0).sample(range(count), min(count, _SAMPLED_ROWS))
    return _checked(path, list(found.select(chosen)), count)


def _sampled(lines: Iterator[str]) -> tuple[list[str], int]:
    """Return some lines, each equally likely, and the number of all lines."""
    generator, sample = random.Random(0), list(islice(lines, _SAMPLED_ROWS))
    count = len(sample)
    for line in lines:
        count += 1
        place = generator.randrange(count)
        if place < _SAMPLED_ROWS:
            sample[place] = line
    return sample, count


def _checked(path: Path, rows: Sequence[Any], count: int) -> Rows:
    if not rows:
        raise ValueError(f"{path} has no rows")
    names: Iterable[str] = rows[0] if isinstance(rows[0], dict) else ()
    names = [name for name in names if isinstance(rows[0][name], str)]
    if len(names) < 2:
        raise ValueError(
            f"{path}: {_cut(json.dumps(rows[0]))} has {len(names)} columns of text; right are two or more, such as "
            '{"anchor": "...", "positive": "..."}'
        )
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{path}: {_cut(json.dumps(row))} lacks a text in one of the columns {', '.join(names)}")
    return Rows([[row[name] for name in names] for row in rows], count)


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 80 else f"{text[:77]}..."
