"""Layouts: the protocols that make the input of a model, one for pairs and one for single texts.

Each text is tokenized once, without special tokens. A layout then joins a query and a document by copying token ids, or
puts special tokens around a single text. The result equals the ids that the model's own tokenizer gives for the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .tokens import EncodedText, TokenSequence


class NoRoomError(ValueError):
    """The length limit leaves no room for a token of each text beside template and special tokens."""


class Layout(Protocol):
    """Methods of all layouts. Any number of threads may use a layout at once.

    Attributes:
        default_instruction: The instruction of requests that give none; ``None`` for models that take no instruction.
        template: Name of the template around query and document; ``None`` for models without one.
    """

    default_instruction: str | None
    template: str | None

    def smallest_length(self, instruction: str | None) -> int:
        """Smallest length limit, in tokens, that leaves room for one token of each text.

        Args:
            instruction: The task in words; ``None`` means the default instruction.
        """

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Tokenize queries.

        Args:
            texts: The queries.
            instruction: The task in words; ``None`` means the default instruction. Models that take no instruction
                ignore it.
            limit: The largest ``max_length`` with which the texts are used: of a longer text, only as many token ids
                are kept, and only the text that they need is tokenized. ``None`` for all tokens.
        """

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Tokenize documents; ``limit`` as in ``encode_queries``."""


@runtime_checkable
class PairLayout(Layout, Protocol):
    """Layout of models that read a query and a document together: cross-encoders and causal rerankers."""

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Tokens of each pair before truncation, special and template tokens included.

        Args:
            queries: Some queries.
            documents: Some documents.
            query_at: Position of each pair's query in ``queries``, shape ``(n,)``.
            document_at: Position of each pair's document in ``documents``, shape ``(n,)``.

        Returns:
            Number of tokens, shape ``(n,)``; at least as many for pairs with a text whose length is not exact.
        """

    def undecided(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
        max_length: int,
    ) -> NDArray[np.bool_]:
        """Whether the input of each pair depends on a length that is not known exactly, shape ``(n,)``.

        Arguments as in ``lengths`` and ``join``. ``join`` must not be called for such a pair before it is known which
        of its texts has more tokens.
        """

    def join(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """Make the inputs of pairs: the first query with the first document, and so on.

        Args:
            queries: One query a pair.
            documents: One document a pair.
            max_length: Most tokens of an input; texts are truncated to fit, template and special tokens are not.

        Raises:
            NoRoomError: A pair needs truncation, and ``max_length`` is below the instruction's ``smallest_length``.
        """


@runtime_checkable
class TextLayout(Layout, Protocol):
    """Layout of models that read each text alone: bi-encoders."""

    def single(self, text: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """Make the input of one text.

        Returns:
            The input, at most ``max_length`` tokens, and whether the text was truncated.

        Raises:
            NoRoomError: ``max_length`` leaves no room for a token of the text.
        """


def sums_of_lengths(
    queries: Sequence[EncodedText],
    documents: Sequence[EncodedText],
    query_at: NDArray[np.int64],
    document_at: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Tokens of both texts of each pair together, without a loop over pairs; arguments as ``PairLayout.lengths``."""
    left = np.array([query.length for query in queries], dtype=np.int64)
    right = np.array([document.length for document in documents], dtype=np.int64)
    sums: NDArray[np.int64] = left[query_at] + right[document_at]
    return sums
