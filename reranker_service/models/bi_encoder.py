"""Layout of bi-encoders: one text with its prompt between special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from .layout import NoRoomError
from .prefix import PrefixTokenizer
from .spec import ModelSpec, UnsupportedModelError
from .tokenizer import special_tokens_around_a_text, tokenize
from .tokens import EncodedText, TokenSequence
from .truncation import Side, keep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BiEncoderLayout:
    """Implements ``TextLayout``."""

    default_instruction: str | None = None
    template: str | None = None

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
        """Find out which special tokens the tokenizer puts around a text.

        Raises:
            UnsupportedModelError: It puts none, so that an empty text would be an empty input.
        """
        self._before, self._after = special_tokens_around_a_text(tokenizer)
        self._special = len(self._before) + len(self._after)
        if not self._special:
            raise UnsupportedModelError(
                f"{spec.name}: its tokenizer adds no special token, so an empty text would be an empty input; "
                "a tokenizer that adds one is needed"
            )
        self._prefixes = PrefixTokenizer(tokenizer)
        self._query_prompt, self._document_prompt = spec.query_prompt, spec.document_prompt
        self._side: Side = "left" if hub.truncation_side == "left" else "right"
        prompts = tokenize(tokenizer, [self._query_prompt, self._document_prompt])
        self._smallest = self._special + max(map(len, prompts)) + 1

    def smallest_length(self, instruction: str | None) -> int:
        """Tokens of the special tokens, the longer prompt and one token of a text."""
        return self._smallest

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Tokenize queries with the prompt for queries."""
        return self._prefixes.encode(texts, limit, self._query_prompt, self._side)

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Tokenize documents with the prompt for documents."""
        return self._prefixes.encode(texts, limit, self._document_prompt, self._side)

    def single(self, text: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """See ``TextLayout.single``."""
        room = max_length - self._special
        if room < 1:
            raise NoRoomError(f"max_length {max_length} leaves no room for a text; the least is {self._smallest}")
        cut = text.length > room
        ids = np.concatenate((self._before, keep(text.ids, room, self._side) if cut else text.ids, self._after))
        return TokenSequence(ids, len(ids)), cut
