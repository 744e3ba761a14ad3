"""From texts to the model's token ids: each text is tokenized once, pairs are joined from the parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..engines.base import TokenSequence
from .causal import CausalLayout
from .layouts import EncodedText, Layout, NoRoomError, PairLayout, SingleLayout
from .spec import ModelKind, ModelSpec, load_tokenizer, plain_tokenizer

__all__ = ["EncodedText", "Encoder", "NoRoomError"]

_LAYOUTS: dict[ModelKind, type[PairLayout] | type[CausalLayout] | type[SingleLayout]] = {
    "cross-encoder": PairLayout,
    "causal-reranker": CausalLayout,
    "bi-encoder": SingleLayout,
}


class Encoder:
    """Turns texts into inputs of one model. Safe to use from any number of threads at once.

    Attributes:
        supports_instruction: Whether the model takes an instruction.
        default_instruction: The instruction where none is given; ``None`` for models that take none.
        min_length: Smallest ``max_length`` that leaves room for a token of each text, in tokens.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Load the tokenizer of ``spec``.

        Raises:
            UnsupportedModelError: The tokenizer can't be loaded, or lacks the special tokens that the kind needs.
        """
        tokenizer = load_tokenizer(spec.path)
        self._layout: Layout = _LAYOUTS[spec.kind](spec, tokenizer, plain_tokenizer(spec, tokenizer))
        self.default_instruction = self._layout.default_instruction
        self.supports_instruction = self.default_instruction is not None
        self.min_length = self.smallest_length(None)

    def smallest_length(self, instruction: str | None) -> int:
        """Smallest ``max_length`` that leaves room for a token of each text with this instruction, in tokens."""
        return self._layout.smallest_length(instruction)

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> list[EncodedText]:
        """Tokenize queries.

        Args:
            texts: The queries.
            instruction: The task in words; ``None`` means the model's default.

        Raises:
            ValueError: An instruction is given for a model that takes none.
        """
        if instruction is not None and not self.supports_instruction:
            raise ValueError("this model takes no instruction")
        return self._layout.encode_queries(texts, instruction)

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenize documents."""
        return self._layout.encode_documents(texts)

    def length(self, query: EncodedText, document: EncodedText) -> int:
        """Tokens of the whole pair, special and template tokens included, nothing cut.

        For a bi-encoder, which takes each text alone, the tokens of the longer one.
        """
        return self._layout.length(query, document)

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """``length`` of many pairs at once.

        Args:
            queries: Some queries.
            documents: Some documents.
            query_at: Position of each pair's query in ``queries``, shape ``(n,)``.
            document_at: Position of each pair's document in ``documents``, shape ``(n,)``.

        Returns:
            Tokens of each pair, nothing cut, shape ``(n,)``.
        """
        return self._layout.lengths(queries, documents, query_at, document_at)

    def join(self, query: EncodedText, document: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """Make the input for a pair; for cross-encoders and causal rerankers.

        Returns:
            The input, at most ``max_length`` tokens, and whether a text was cut to make it fit.

        Raises:
            NoRoomError: ``max_length`` is below ``smallest_length`` of the instruction, and the pair needs cutting.
        """
        return self._layout.join(query, document, max_length)

    def join_all(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """``join`` of many pairs, in less time: the first query with the first document, and so on.

        Raises:
            NoRoomError: As ``join``.
        """
        return self._layout.join_all(queries, documents, max_length)

    def single(self, text: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """Make the input for one text; for bi-encoders.

        Returns:
            The input, at most ``max_length`` tokens, and whether the text was cut to make it fit.

        Raises:
            NoRoomError: ``max_length`` leaves no room for a token.
        """
        return self._layout.single(text, max_length)
