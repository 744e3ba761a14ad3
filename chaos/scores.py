"""Closed form: texts that are numbers, their tokens, and the score of a query's and a document's number.

A text is a number below a billion, written as three words with the values of its digits to base 1,000. The vocabulary
has a token for each word, so that a text's tokens give its number without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BASE = 1000
WORDS = 3
"""Words of a text, and tokens of it."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Tokens before those of the words 0 to 999."""

Numbers = NDArray[np.int64]


def text_of(number: int) -> str:
    """Write a number as a text."""
    return f"{number // BASE**2} {number // BASE % BASE} {number % BASE}"


def texts_of(numbers: Numbers) -> list[str]:
    """Write numbers as texts."""
    return [text_of(number) for number in numbers.tolist()]


def vocabulary() -> dict[str, int]:
    """Return the id of each token."""
    return {token: place for place, token in enumerate((*SPECIAL_TOKENS, *map(str, range(BASE))))}


def numbers_of(ids: NDArray[np.int32]) -> Numbers:
    """Read numbers from token ids, shape ``(n, WORDS)``; returns shape ``(n,)``."""
    digits = ids.astype(np.int64) - len(SPECIAL_TOKENS)
    return (digits[:, 0] * BASE + digits[:, 1]) * BASE + digits[:, 2]


def raw_scores(queries: Numbers, documents: Numbers, seed: int) -> NDArray[np.float32]:
    """Compute raw scores in [-8, 8) that look random, exact in float32.

    Args:
        queries: Numbers of the queries.
        documents: Numbers of the documents; broadcast with ``queries``.
        seed: The model: scores of other seeds are others.
    """
    with np.errstate(over="ignore"):
        mixed = queries.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = mixed ^ (documents.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(seed))
        for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(factor)
    # The upper 24 bits, which are what a float32 holds.
    return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 20) - np.float32(8)


def raw_scores_of_texts(queries: Sequence[str], documents: Sequence[str], seed: int) -> NDArray[np.float32]:
    """Compute the raw scores of a grid of texts, shape ``(queries, documents)``."""
    rows, columns = (np.array([_number(text) for text in side], dtype=np.int64) for side in (queries, documents))
    return raw_scores(rows[:, None], columns[None, :], seed)


def _number(text: str) -> int:
    first, second, third = map(int, text.split())
    return (first * BASE + second) * BASE + third
