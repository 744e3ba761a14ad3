"""Queries and documents with the lengths of Natural Questions, made of the words of installed packages' docstrings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.texts import Grid
from examples.docstrings import collect

QUERY_TOKENS = 12
"""Tokens of a query, as the questions of Natural Questions have in the mean."""
# Documents: log-normal, with a mean of about 140 tokens; cut to the model's room.
_MEDIAN_TOKENS = 110.0
_SIGMA = 0.7
_LEAST_TOKENS = 16
_PACKAGES = ("stdlib", "numpy", "scipy", "sklearn", "torch")


def words() -> list[str]:
    """Words of docstrings, in their order."""
    return " ".join(f"{pair.summary} {pair.body}" for pair in collect(4_000, _PACKAGES)).split()


def real_grid(rows: int) -> Grid:
    """Summaries of docstrings and their bodies; query and document of a row belong together.

    They are the quality study's held-out pairs: none of its guides was trained on them.

    Args:
        rows: Number of queries, and of documents.
    """
    # A GPU machine may lack what the study needs.
    from quality import sources
    from quality.plan import FULL

    pairs = sources.read("docstrings", FULL.pairs, FULL.packages)
    held_out = sources.split(pairs, FULL.guide_share, FULL.held_out_share).held_out
    chosen = list({pair.summary: pair for pair in {pair.body: pair for pair in held_out}.values()}.values())
    chosen = chosen[:: max(len(chosen) // rows, 1)][:rows]
    return Grid(tuple(pair.summary for pair in chosen), tuple(pair.body for pair in chosen))


def training_texts(source: Sequence[str]) -> list[str]:
    """Texts of 60 words, to train a tokenizer on."""
    return [" ".join(source[start : start + 60]) for start in range(0, len(source) - 60, 60)]


class PairSource:
    """Makes grids of new texts.

    Args:
        source: Words.
        tokenizer: The model's tokenizer; decides how many words make a token.
        room: Most tokens of a document.
        seed: Seed of the choice of texts; equal seeds give equal texts.
    """

    def __init__(self, source: Sequence[str], tokenizer: Any, room: int, seed: int = 0) -> None:
        self._words = source
        self._room = room
        self._generator = np.random.default_rng(seed)
        sample = " ".join(source[:2_000])
        self._per_word = len(tokenizer(sample, add_special_tokens=False, truncation=False)["input_ids"]) / 2_000

    def grid(self, queries: int, documents: int) -> Grid:
        """Return ``queries`` queries and ``documents`` documents."""
        lengths = self._generator.lognormal(np.log(_MEDIAN_TOKENS), _SIGMA, documents).clip(_LEAST_TOKENS, self._room)
        return Grid(
            tuple(self._text(QUERY_TOKENS) for _ in range(queries)), tuple(self._text(length) for length in lengths)
        )

    def _text(self, tokens: float) -> str:
        count = max(round(tokens / self._per_word), 1)
        start = int(self._generator.integers(len(self._words) - count))
        return " ".join(self._words[start : start + count])
