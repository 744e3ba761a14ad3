"""How a query and a document become the input of a causal reranker: the template around them, and cuts that spare it.

The template puts ":" and a space before query and document. Byte-level tokenizers never let a token span the colon and
the space, so what stands before each space can be tokenized by itself. Where a tokenizer does otherwise, every pair is
tokenized as a whole: the same ids, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..engines.base import TokenSequence
from . import templates
from .layouts import EncodedText, Ids, Layout, NoRoomError, single_affixes, sums_of_lengths, tokenize
from .spec import ModelSpec
from .truncation import query_and_document

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
_AWKWARD = (*_SPACES, *_SPACED, *_SIGNS, *_COMBINING, *_TEMPLATE)


class CausalLayout(Layout):
    """Qwen3-Reranker's template around instruction, query and document: causal rerankers.

    The document is cut at its end, as the model card does. Only where the query leaves no room for a document is the
    query cut, too, at its end; "<Document>:" stays.
    """

    default_instruction = templates.DEFAULT_INSTRUCTION

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        prefix, suffix, self._mark = tokenize(tokenizer, [templates.PREFIX, templates.SUFFIX, templates.DOCUMENT_MARK])
        before, after = single_affixes(tokenizer)
        self._prefix, self._suffix = np.concatenate((prefix, before)), np.concatenate((after, suffix))
        self._overhead = len(self._prefix) + len(self._suffix)
        self._whole = not self._parts_are_exact()

    def smallest_length(self, instruction: str | None) -> int:
        """Tokens that leave room for one token of each text beside the template with ``instruction``."""
        return self._overhead + len(self._head(instruction)) + len(self._mark) + 2

    def encode_queries(self, texts: Sequence[str], instruction: str | None) -> list[EncodedText]:
        """Tokenize queries with the part of the template from the instruction to the document."""
        head = self._head(instruction)
        opening = self._opening(instruction)
        tails = [f" {text}{templates.DOCUMENT_MARK}" for text in texts]
        return [
            EncodedText(np.concatenate((head, ids)), len(head), opening + tail if self._whole else None)
            for tail, ids in zip(tails, tokenize(self._tokenizer, tails), strict=True)
        ]

    def encode_documents(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenize documents with the space before them."""
        spaced = [" " + text for text in texts]
        return [
            EncodedText(ids, source=text if self._whole else None)
            for text, ids in zip(spaced, tokenize(self._tokenizer, spaced), strict=True)
        ]

    def length(self, query: EncodedText, document: EncodedText) -> int:
        """Tokens of the pair with the template, nothing cut."""
        if self._whole:
            return self._overhead + len(self._body(query, document))
        return self._overhead + len(query.ids) + len(document.ids)

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """``length`` of many pairs, which are given as positions in both lists."""
        if self._whole:
            return super().lengths(queries, documents, query_at, document_at)
        return self._overhead + sums_of_lengths(queries, documents, query_at, document_at)

    def join(self, query: EncodedText, document: EncodedText, max_length: int) -> tuple[TokenSequence, bool]:
        """The input for a pair, and whether a text was cut."""
        room = max_length - self._overhead
        left, right = query.ids, document.ids
        if self._whole:
            left, right = self._body(query, document), right[:0]
        cut = len(left) + len(right) > room
        if cut and len(query.ids) < room:
            left, right = left[:room], right[: max(0, room - len(left))]
        elif cut:
            left, right = self._cut_both(query, document, room)
        ids = np.concatenate((self._prefix, left, right, self._suffix))
        return TokenSequence(ids, len(ids)), cut

    def _cut_both(self, query: EncodedText, document: EncodedText, room: int) -> tuple[Ids, Ids]:
        template = query.head + len(self._mark)
        if room - template < 2:
            raise NoRoomError(
                f"max_length {room + self._overhead} leaves no room for both texts beside the template with this "
                f"instruction; the least is {self._overhead + template + 2}"
            )
        text, kept = query_and_document(len(query.ids) - template, len(document.ids), room - template)
        # A newline may share its token with the query's last character: the mark is put back from its own ids.
        return np.concatenate((query.ids[: query.head + text], self._mark)), document.ids[:kept]

    def _opening(self, instruction: str | None) -> str:
        return templates.query_head(self.default_instruction if instruction is None else instruction)

    def _head(self, instruction: str | None) -> Ids:
        return tokenize(self._tokenizer, [self._opening(instruction)])[0]

    def _body(self, query: EncodedText, document: EncodedText) -> Ids:
        return tokenize(self._tokenizer, [f"{query.source}{document.source}"])[0]

    def _parts_are_exact(self) -> bool:
        """Whether tokens never span a colon and the space after it, tried on texts of every awkward sort."""
        pairs = [(text, "a b") for text in _AWKWARD] + [("a b", text) for text in _AWKWARD]
        self._whole = False
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
