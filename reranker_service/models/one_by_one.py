"""Layouts of models whose input cannot be joined: sentence-transformers makes the input of each pair or text.

The input of a pair is made when the engine reads it, in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .layout import sums_of_lengths
from .spec import ModelSpec
from .tokenizer import tokenize
from .tokens import EncodedText, TokenSequence

_NO_LIMIT = 1 << 30


class InputMaker(Protocol):
    """Makes the input of a pair or a text."""

    @property
    def has_messages(self) -> bool:
        """Whether a pair is rendered by a chat template."""

    def tokens(self, text: str | tuple[str, str], prompt: str, max_length: int) -> TokenSequence:
        """The input of a pair or a text, at most ``max_length`` tokens long."""


class _Raw(EncodedText):
    """A text that the library tokenizes later."""

    __slots__ = ("prompt", "text")

    text: str
    prompt: str


def _raw(text: str, prompt: str, ids: NDArray[np.int32], limit: int | None) -> EncodedText:
    # A copy, because a view would keep all ids in memory.
    raw = _Raw(ids if limit is None or len(ids) <= limit else ids[:limit].copy(), length=len(ids))
    object.__setattr__(raw, "text", text)
    object.__setattr__(raw, "prompt", prompt)
    return raw


class _Later(TokenSequence):
    """An input that the library makes when its token ids are first read."""

    __slots__ = ("_made", "_make")

    _make: Callable[[], TokenSequence]
    _made: TokenSequence | None

    def __init__(self, make: Callable[[], TokenSequence]) -> None:
        object.__setattr__(self, "_make", make)
        object.__setattr__(self, "_made", None)

    @property
    def _sequence(self) -> TokenSequence:
        made = self._made
        if made is None:
            made = self._make()
            object.__setattr__(self, "_made", made)
        return made

    @property
    def ids(self) -> NDArray[np.int32]:
        return self._sequence.ids

    @property
    def first_segment(self) -> int:
        return self._sequence.first_segment


class PairByPairLayout:
    """Implements ``PairLayout``: the library makes the input of every pair.

    Lengths are estimates: the tokens of both texts, and those that the library adds to two short texts. Truncation is
    the library's.
    """

    def __init__(self, spec: ModelSpec, library: InputMaker, tokenizer: Tokenizer) -> None:
        """Measure the tokens that the library adds to a pair."""
        self._library = library
        self._tokenizer = tokenizer
        self._prompt = spec.query_prompt
        self._added = len(library.tokens(("a", "b"), spec.query_prompt, spec.max_length).ids)
        self._added -= sum(map(len, tokenize(tokenizer, ["a", "b"])))
        self.template: str | None = "chat-template" if library.has_messages else None
        takes = False
        if library.has_messages:
            with_prompt = library.tokens(("a", "b"), "instruction", spec.max_length)
            without = library.tokens(("a", "b"), "", spec.max_length)
            takes = not np.array_equal(with_prompt.ids, without.ids)
        self.default_instruction: str | None = spec.query_prompt if takes else None

    def smallest_length(self, instruction: str | None) -> int:
        """See ``Layout.smallest_length``."""
        more = 0 if instruction is None else len(tokenize(self._tokenizer, [instruction])[0])
        return max(self._added, 0) + more + 2

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Keep queries with their instruction, and their tokens as a measure of length."""
        prompt = self._prompt if instruction is None or self.default_instruction is None else instruction
        tokens = tokenize(self._tokenizer, texts)
        return [_raw(text, prompt, ids, limit) for text, ids in zip(texts, tokens, strict=True)]

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Keep documents, and their tokens as a measure of length."""
        tokens = tokenize(self._tokenizer, texts)
        return [_raw(text, "", ids, limit) for text, ids in zip(texts, tokens, strict=True)]

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """See ``PairLayout.lengths``."""
        return np.maximum(self._added + sums_of_lengths(queries, documents, query_at, document_at), 1)

    def undecided(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
        max_length: int,
    ) -> NDArray[np.bool_]:
        """See ``PairLayout.undecided``."""
        return np.zeros(len(query_at), dtype=np.bool_)

    def join(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """See ``PairLayout.join``."""
        return [self._later(query, document, max_length) for query, document in zip(queries, documents, strict=True)]

    def _later(self, query: EncodedText, document: EncodedText, max_length: int) -> TokenSequence:
        assert isinstance(query, _Raw)
        assert isinstance(document, _Raw)
        pair, prompt = (query.text, document.text), query.prompt
        return _Later(lambda: self._library.tokens(pair, prompt, max_length))


class TextByTextLayout:
    """Implements ``TextLayout``: the library makes the input of every text."""

    default_instruction: str | None = None
    template: str | None = None

    def __init__(self, spec: ModelSpec, library: InputMaker) -> None:
        """Set up."""
        self._library = library
        self._prompts = spec.query_prompt, spec.document_prompt
        self._longest = spec.max_length
        prompts = [len(library.tokens("a", prompt, spec.max_length).ids) for prompt in self._prompts]
        self._smallest = max(prompts)

    def smallest_length(self, instruction: str | None) -> int:
        """See ``Layout.smallest_length``."""
        return self._smallest

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Keep queries, and their input as a measure of length."""
        return [self._encode(text, self._prompts[0], limit) for text in texts]

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Keep documents, and their input as a measure of length."""
        return [self._encode(text, self._prompts[1], limit) for text in texts]

    def _encode(self, text: str, prompt: str, limit: int | None) -> EncodedText:
        return _raw(text, prompt, self._library.tokens(text, prompt, _NO_LIMIT).ids, limit)

    def single(self, text: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """See ``TextLayout.single``."""
        assert isinstance(text, _Raw)
        if text.length <= min(max_length, len(text.ids)):
            return TokenSequence(text.ids, len(text.ids)), False
        return self._library.tokens(text.text, text.prompt, max_length), text.length > max_length
