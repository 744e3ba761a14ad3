"""Layout of causal rerankers: the template of Qwen3-Reranker around instruction, query and document.

The template puts ":" and a space before query and document. Byte-level tokenizers never make one token of the colon and
the space, so that the text from each space on can be tokenized by itself. Other tokenizers are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import templates
from .layout import NoRoomError, sums_of_lengths
from .prefix import PrefixTokenizer
from .spec import ModelSpec, UnsupportedModelError
from .tokenizer import special_tokens_around_a_text, tokenize
from .tokens import EncodedText, Ids, TokenSequence
from .truncation import keep_used, query_and_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACES = ("", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00", "\x7f")
_SPACED = ("a", " a", "  a", "a ", "a  ", "\na", "a\n", "a\n\n", " \n a \n ", "\ta", "A" * 40, "a-b_c", "ÀB c")
_SIGNS = ("?", "?\n", "a?\n", "...", "'s", "'S it", "1", "12 3", " 1", "٣", ":", ": a", "<", ">", "▁a", "Ġa")
_COMBINING = (
    "\u0301",
    "\u0301a",
    "e\u0301",
    "a \u0338",
    "\u0338",
    "\u1112\u1161\u11ab",
    "नि",
    "👩‍👧",
    "😀",
    "Ａ",
    "ﬁ",
    "日本",
)
_TEMPLATE = ("<|im_end|>", " <|im_end|> ", "<Document>:", "\n<Document>: a")
# Texts that a tokenizer might join with the colon before them.
_AWKWARD = (*_SPACES, *_SPACED, *_SIGNS, *_COMBINING, *_TEMPLATE)


class CausalLayout:
    """Implements ``PairLayout``.

    The document is truncated at its end, as the model card does. The query is truncated at its end only if it leaves no
    room for a document; "<Document>:" is kept.
    """

    default_instruction = templates.DEFAULT_INSTRUCTION
    template = templates.NAME

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
        """Tokenize the template.

        Raises:
            UnsupportedModelError: The tokenizer makes one token of the colon and the text after it.
        """
        self._tokenizer = tokenizer
        self._prefixes = PrefixTokenizer(tokenizer)
        prefix, suffix, self._mark = tokenize(tokenizer, [templates.PREFIX, templates.SUFFIX, templates.DOCUMENT_MARK])
        before, after = special_tokens_around_a_text(tokenizer)
        self._prefix, self._suffix = np.concatenate((prefix, before)), np.concatenate((after, suffix))
        self._overhead = len(self._prefix) + len(self._suffix)
        if not self._parts_are_exact():
            raise UnsupportedModelError(
                f"{spec.name}: its tokenizer makes one token of the template's colon and the text after it, which a "
                "tokenizer of Qwen3-Reranker never does; a byte-level tokenizer is needed"
            )

    def smallest_length(self, instruction: str | None) -> int:
        """See ``Layout.smallest_length``."""
        return self._overhead + len(self._head(instruction)) + len(self._mark) + 2

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Tokenize queries with the part of the template from the instruction to the document."""
        head = self._head(instruction)
        tails = self._prefixes.tokenize(texts, limit, " ", templates.DOCUMENT_MARK)
        encoded = (keep_used(np.concatenate((head, tail)), exact, limit) for tail, exact in tails)
        return [replace(one, head=len(head)) for one in encoded]

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Tokenize documents with the space before them."""
        return self._prefixes.encode(texts, limit, " ")

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """See ``PairLayout.lengths``."""
        return self._overhead + sums_of_lengths(queries, documents, query_at, document_at)

    def undecided(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
        max_length: int,
    ) -> NDArray[np.bool_]:
        """See ``PairLayout.undecided``: truncation of a pair does not compare the lengths of its texts."""
        return np.zeros(len(query_at), dtype=np.bool_)

    def join(
        self, queries: Sequence[EncodedText], documents: Sequence[EncodedText], max_length: int
    ) -> list[TokenSequence]:
        """See ``PairLayout.join``."""
        return [self._join(query, document, max_length) for query, document in zip(queries, documents, strict=True)]

    def _join(self, query: EncodedText, document: EncodedText, max_length: int) -> TokenSequence:
        room = max_length - self._overhead
        left, right = query.ids, document.ids
        if len(left) + len(right) > room:
            if len(left) < room:
                right = right[: room - len(left)]
            else:
                left, right = self._cut_both(query, document, room)
        ids = np.concatenate((self._prefix, left, right, self._suffix))
        return TokenSequence(ids, len(ids))

    def _cut_both(self, query: EncodedText, document: EncodedText, room: int) -> tuple[Ids, Ids]:
        template = query.head + len(self._mark)
        if room - template < 2:
            raise NoRoomError(
                f"max_length {room + self._overhead} leaves no room for both texts beside the template with this "
                f"instruction; the least is {self._overhead + template + 2}"
            )
        text, kept = query_and_document(len(query.ids) - template, len(document.ids), room - template)
        # The mark's newline may share a token with the query's last character, so the mark's own ids are appended.
        return np.concatenate((query.ids[: query.head + text], self._mark)), document.ids[:kept]

    def _head(self, instruction: str | None) -> Ids:
        opening = templates.query_head(self.default_instruction if instruction is None else instruction)
        return tokenize(self._tokenizer, [opening])[0]

    def _parts_are_exact(self) -> bool:
        """Whether texts tokenized by themselves give the tokens of the whole template; tried on awkward texts."""
        pairs = [(text, "a b") for text in _AWKWARD] + [("a b", text) for text in _AWKWARD]
        queries = self.encode_queries([query for query, _ in pairs], None)
        documents = self.encode_documents([document for _, document in pairs])
        bodies = tokenize(
            self._tokenizer,
            [templates.body(templates.DEFAULT_INSTRUCTION, query, document) for query, document in pairs],
        )
        return all(
            np.array_equal(np.concatenate((query.ids, document.ids)), body)
            for query, document, body in zip(queries, documents, bodies, strict=True)
        )
