"""Layout of cross-encoders: both texts between special tokens, such as ``[CLS] query [SEP] document [SEP]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .layout import NoRoomError, sums_of_lengths
from .prefix import PrefixTokenizer
from .spec import ModelSpec, UnsupportedModelError
from .tokenizer import text_span, tokenize
from .tokens import EncodedText, Ids, TokenSequence
from .truncation import Side, keep, longest_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CrossEncoderLayout:
    """Implements ``PairLayout``. The longer text is truncated first: the strategy "longest_first" of tokenizers.

    Attributes:
        has_separator: Whether there is a special token between the texts.
    """

    default_instruction: str | None = None
    template: str | None = None

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
        """Find out which special tokens the tokenizer puts around and between two texts.

        Raises:
            UnsupportedModelError: The token types are not zeros followed by ones.
        """
        probe = tokenizer.encode("a", "b")
        owner = probe.sequence_ids
        first, second = text_span(owner, 0), text_span(owner, 1)
        ids = np.array(probe.ids, dtype=np.int32)
        self._before, self._between, self._after = (
            ids[: first.start],
            ids[first.stop : second.start],
            ids[second.stop :],
        )
        self.has_separator = len(self._between) > 0
        types = probe.type_ids if "token_type_ids" in hub.model_input_names else [0] * len(ids)
        if types != sorted(types) or set(types) - {0, 1}:
            raise UnsupportedModelError(
                f"{spec.name}: its tokenizer gives token types {types}; needed are zeros followed by ones"
            )
        # Number of separator tokens that belong to the first segment; None where there is only one segment.
        self._first_between = types[first.stop : second.start].count(0) if any(types) else None
        self._tokenizer = tokenizer
        self._prefixes = PrefixTokenizer(tokenizer)
        self._prompt = spec.query_prompt
        self._side: Side = "left" if hub.truncation_side == "left" else "right"
        self._special = len(self._before) + len(self._between) + len(self._after)

    def smallest_length(self, instruction: str | None) -> int:
        """See ``Layout.smallest_length``."""
        return self._special + 2 + len(tokenize(self._tokenizer, [self._prompt])[0])

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Tokenize queries with the model's prompt for queries."""
        return self._prefixes.encode(texts, limit, self._prompt, self._side)

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Tokenize documents."""
        return self._prefixes.encode(texts, limit, "", self._side)

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """See ``PairLayout.lengths``."""
        return self._special + sums_of_lengths(queries, documents, query_at, document_at)

    def undecided(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
        max_length: int,
    ) -> NDArray[np.bool_]:
        """See ``PairLayout.undecided``: of an odd room, the longer one of two long texts gets the odd token."""
        room = max_length - self._special
        if room % 2 == 0 or all(one.exact for one in (*queries, *documents)):
            return np.zeros(len(query_at), dtype=np.bool_)
        first, first_exact = _lengths(queries, query_at)
        second, second_exact = _lengths(documents, document_at)
        decided = (
            (first_exact & second_exact)
            | (2 * np.minimum(first, second) <= room)
            # A length that is not exact is at least as large.
            | (first_exact & (second >= first))
            | (second_exact & (first > second))
        )
        undecided: NDArray[np.bool_] = ~decided
        return undecided

    def join(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """See ``PairLayout.join``. All inputs are slices of one array: numpy calls for each pair would dominate."""
        room = max_length - self._special
        if room < 2:
            raise NoRoomError(
                f"max_length {max_length} leaves no room for both texts; the least is {self._special + 2}"
            )
        parts: list[Ids] = []
        spans: list[tuple[int, int, int]] = []  # begin, end and tokens of the first segment of each input
        start = 0
        for query, document in zip(queries, documents, strict=True):
            left, right = query.ids, document.ids
            if query.length + document.length > room:
                first, second = longest_first(query.length, document.length, room)
                left, right = keep(left, first, self._side), keep(right, second, self._side)
            parts += (self._before, left, self._between, right, self._after)
            length = self._special + len(left) + len(right)
            between = None if self._first_between is None else len(self._before) + len(left) + self._first_between
            spans.append((start, start + length, length if between is None else between))
            start += length
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return [TokenSequence(ids[begin:end], first_segment) for begin, end, first_segment in spans]


def _lengths(texts: Sequence[EncodedText], at: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens of the texts at some positions, and whether these numbers are exact."""
    lengths = np.array([text.length for text in texts], dtype=np.int64)
    exact = np.array([text.exact for text in texts], dtype=np.bool_)
    return lengths[at], exact[at]
