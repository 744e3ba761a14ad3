"""How texts become a model's input: special tokens and cuts, one class for each kind of model.

Texts are tokenized once each, without special tokens. Joining then only copies ids, and gives the very ids that the
model's own tokenizer gives for the whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..engines.base import TokenSequence
from .spec import ModelSpec, UnsupportedModelError
from .truncation import Side, keep, longest_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]


class NoRoomError(ValueError):
    """The length limit leaves no room for a token of each text beside the template."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text as token ids.

    Attributes:
        ids: Token ids without special tokens, int32, shape ``(tokens,)``; with prompt or template part, if any.
        head: How many leading tokens belong to the template and are never cut.
        source: The text with its part of the template, where only the whole can be tokenized; else ``None``.
    """

    ids: Ids
    head: int = 0
    source: str | None = None


class Layout(ABC):
    """How one kind of model wants its input.

    Attributes:
        default_instruction: The instruction where none is given; ``None`` for models that take none.
    """

    default_instruction: str | None = None

    @abstractmethod
    def smallest_length(self, instruction: str | None) -> int:
        """Tokens that leave room for one token of each text."""

    @abstractmethod
    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> list[EncodedText]:
        """Tokenize queries."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenize documents."""

    @abstractmethod
    def length(self, query: EncodedText, document: EncodedText) -> int:
        """Tokens of the pair, nothing cut; where texts go alone, of the longer one."""

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """``length`` of many pairs, which are given as positions in both lists."""
        return np.array(
            [
                self.length(queries[query], documents[document])
                for query, document in zip(query_at.tolist(), document_at.tolist(), strict=True)
            ],
            dtype=np.int64,
        )

    def join(self, query: EncodedText, document: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """The input for a pair, and whether a text was cut."""
        raise TypeError("this model takes each text alone")

    def join_all(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """The inputs of pairs."""
        return [self.join(query, document, max_length)[0] for query, document in zip(queries, documents, strict=True)]

    def single(self, text: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """The input for one text, and whether it was cut."""
        raise TypeError("this model takes both texts of a pair together")


class PairLayout(Layout):
    """Both texts between special tokens, such as ``[CLS] query [SEP] document [SEP]``: cross-encoders."""

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
        probe = tokenizer.encode("a", "b")
        owner = probe.sequence_ids
        first, second = _span(owner, 0), _span(owner, 1)
        ids = np.array(probe.ids, dtype=np.int32)
        self._before, self._between, self._after = (
            ids[: first.start],
            ids[first.stop : second.start],
            ids[second.stop :],
        )
        if not len(self._between):
            raise UnsupportedModelError(f"{spec.name}: its tokenizer puts no special token between query and document")
        types = probe.type_ids if "token_type_ids" in hub.model_input_names else [0] * len(ids)
        if types != sorted(types) or set(types) - {0, 1}:
            raise UnsupportedModelError(f"{spec.name}: token types {types} are not some zeros, then some ones")
        # How many of the tokens between the texts are of the first segment; None where all tokens are.
        self._first_between = types[first.stop : second.start].count(0) if any(types) else None
        self._tokenizer = tokenizer
        self._prompt = spec.query_prompt
        self._side: Side = "left" if hub.truncation_side == "left" else "right"
        self._special = len(self._before) + len(self._between) + len(self._after)

    def smallest_length(self, instruction: str | None) -> int:
        """Tokens that leave room for one token of each text."""
        return self._special + 2 + len(tokenize(self._tokenizer, [self._prompt])[0])

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> list[EncodedText]:
        """Tokenize queries."""
        return [EncodedText(ids) for ids in tokenize(self._tokenizer, [self._prompt + text for text in texts])]

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenize documents."""
        return [EncodedText(ids) for ids in tokenize(self._tokenizer, texts)]

    def length(self, query: EncodedText, document: EncodedText) -> int:
        """Tokens of the pair, nothing cut."""
        return self._special + len(query.ids) + len(document.ids)

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """``length`` of many pairs, which are given as positions in both lists."""
        return self._special + sums_of_lengths(queries, documents, query_at, document_at)

    def join(self, query: EncodedText, document: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """The input for a pair, and whether a text was cut."""
        (sequence,) = self.join_all([query], [document], max_length)
        return sequence, self.length(query, document) > max_length

    def join_all(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """The inputs of pairs, all in one array: a call of numpy a pair is what would take longest."""
        room = max_length - self._special
        if room < 2:
            raise NoRoomError(
                f"max_length {max_length} leaves no room for both texts; the least is {self._special + 2}"
            )
        parts: list[NDArray[np.int32]] = []
        spans: list[tuple[int, int, int]] = []
        start = 0
        for query, document in zip(queries, documents, strict=True):
            left, right = query.ids, document.ids
            if len(left) + len(right) > room:
                first, second = longest_first(len(left), len(right), room)
                left, right = keep(left, first, self._side), keep(right, second, self._side)
            parts += (self._before, left, self._between, right, self._after)
            length = self._special + len(left) + len(right)
            between = None if self._first_between is None else len(self._before) + len(left) + self._first_between
            spans.append((start, start + length, length if between is None else between))
            start += length
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return [TokenSequence(ids[begin:end], first_segment) for begin, end, first_segment in spans]


class SingleLayout(Layout):
    """One text with its prompt between special tokens: bi-encoders."""

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
        self._before, self._after = single_affixes(tokenizer)
        self._special = len(self._before) + len(self._after)
        if not self._special:
            raise UnsupportedModelError(
                f"{spec.name}: its tokenizer adds no special token, so an empty text is no input"
            )
        self._tokenizer = tokenizer
        self._query_prompt, self._document_prompt = spec.query_prompt, spec.document_prompt
        self._side: Side = "left" if hub.truncation_side == "left" else "right"
        prompts = tokenize(tokenizer, [self._query_prompt, self._document_prompt])
        self._smallest = self._special + max(map(len, prompts)) + 1

    def smallest_length(self, instruction: str | None) -> int:
        """Tokens that leave room for the longer prompt and one token."""
        return self._smallest

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> list[EncodedText]:
        """Tokenize queries with the prompt for queries."""
        return [EncodedText(ids) for ids in tokenize(self._tokenizer, [self._query_prompt + text for text in texts])]

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenize documents with the prompt for documents."""
        return [EncodedText(ids) for ids in tokenize(self._tokenizer, [self._document_prompt + text for text in texts])]

    def length(self, query: EncodedText, document: EncodedText) -> int:
        """Tokens of the longer of the two."""
        return self._special + max(len(query.ids), len(document.ids))

    def single(self, text: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """The input for one text, and whether it was cut."""
        room = max_length - self._special
        if room < 1:
            raise NoRoomError(f"max_length {max_length} leaves no room for a text; the least is {self._smallest}")
        cut = len(text.ids) > room
        ids = np.concatenate((self._before, keep(text.ids, room, self._side) if cut else text.ids, self._after))
        return TokenSequence(ids, len(ids)), cut


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text, int32, without special tokens."""
    return [
        np.array(encoding.ids, dtype=np.int32)
        for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def sums_of_lengths(
    queries: Sequence[EncodedText],
    documents: Sequence[EncodedText],
    query_at: NDArray[np.int64],
    document_at: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Tokens of both texts of each pair together, without a loop over pairs; shape ``(n,)``."""
    left = np.array([len(query.ids) for query in queries], dtype=np.int64)
    right = np.array([len(document.ids) for document in documents], dtype=np.int64)
    sums: NDArray[np.int64] = left[query_at] + right[document_at]
    return sums


def single_affixes(tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """The special tokens before and after one text."""
    probe = tokenizer.encode("a")
    text = _span(probe.sequence_ids, 0)
    ids = np.array(probe.ids, dtype=np.int32)
    return ids[: text.start], ids[text.stop :]


def _span(owner: Sequence[int | None], sequence: int) -> slice:
    """Where the tokens of a sequence lie, by the sequence that each token belongs to."""
    start = owner.index(sequence)
    return slice(start, start + owner.count(sequence))
