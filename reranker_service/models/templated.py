"""Layout of causal rerankers: a template around instruction, query and document.

Templates put ":" and a space before query and document. Byte-level tokenizers never make one token of the colon and the
space, so that the text from each space on can be tokenized by itself. Tokenizers for which a template's parts are not
exact are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .awkward import AWKWARD
from .layout import NoRoomError, sums_of_lengths
from .prefix import PrefixTokenizer
from .spec import ModelSpec, UnsupportedModelError
from .template import Template
from .tokenizer import special_tokens_around_a_text, tokenize
from .tokens import EncodedText, Ids, TokenSequence
from .truncation import keep_used, query_and_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOTHING: Ids = np.empty(0, dtype=np.int32)


class TemplateLayout:
    """Implements ``PairLayout``.

    The document is truncated at its end. The query is truncated at its end only if it leaves no room for a document;
    the texts of the template are kept.
    """

    def __init__(self, spec: ModelSpec, hub: PreTrainedTokenizerBase, tokenizer: Tokenizer, template: Template) -> None:
        """Tokenize the template.

        Raises:
            UnsupportedModelError: The tokenizer makes one token of a part of the template and the text after it, or
                lacks the template's first token.
        """
        self._template = template
        self.template: str | None = template.name
        self.default_instruction = template.default_instruction
        if template.default_instruction is not None and spec.query_prompt:
            self.default_instruction = spec.query_prompt
        self._tokenizer = tokenizer
        self._prefixes = PrefixTokenizer(tokenizer)
        self._mark, self._tail = tokenize(tokenizer, [template.query[1], template.document[1]])
        # Tokens before a text that belong to no token with the text's own characters.
        leads = tokenize(tokenizer, [template.query[0].rstrip(), template.document[0].rstrip()])
        self._query_lead, self._document_lead = map(len, leads)
        before, after = special_tokens_around_a_text(tokenizer) if template.special_tokens else (_NOTHING, _NOTHING)
        if template.bos and hub.bos_token_id is None:
            raise UnsupportedModelError(f"{spec.name}: its tokenizer has no token for the beginning of a text")
        first = np.array([hub.bos_token_id], dtype=np.int32) if template.bos else _NOTHING
        self._prefix = np.concatenate((first, *tokenize(tokenizer, template.prefix), before))
        self._between = np.concatenate(tokenize(tokenizer, [*template.between, template.document_head]))
        self._suffix = np.concatenate((after, *tokenize(tokenizer, template.suffix)))
        # A document that was truncated has lost the text after it.
        self._cut_suffix = np.concatenate((self._tail, self._suffix))
        self._fixed = len(self._prefix) + len(self._between)
        if not self._parts_are_exact():
            raise UnsupportedModelError(
                f"{spec.name}: its tokenizer makes one token of the colon in the template {template.name} and the text "
                "after it, which a tokenizer of this family never does; a byte-level tokenizer is needed"
            )

    def smallest_length(self, instruction: str | None) -> int:
        """See ``Layout.smallest_length``."""
        head = len(self._head(instruction)) + self._query_lead
        return self._fixed + len(self._cut_suffix) + head + len(self._mark) + self._document_lead + 2

    def encode_queries(
        self, texts: Sequence[str], instruction: str | None, limit: int | None = None
    ) -> list[EncodedText]:
        """Tokenize queries with the part of the template from the instruction to the texts between."""
        head = self._head(instruction)
        fixed = len(head) + self._query_lead
        tails = self._prefixes.tokenize(texts, limit, *self._template.query)
        encoded = (keep_used(np.concatenate((head, tail)), exact, limit) for tail, exact in tails)
        return [replace(one, head=fixed) for one in encoded]

    def encode_documents(self, texts: Sequence[str], limit: int | None = None) -> list[EncodedText]:
        """Tokenize documents with the texts beside them."""
        found = self._prefixes.tokenize(texts, limit, *self._template.document)
        return [keep_used(ids, exact, limit) for ids, exact in found]

    def lengths(
        self,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """See ``PairLayout.lengths``."""
        return self._fixed + len(self._suffix) + sums_of_lengths(queries, documents, query_at, document_at)

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
        left, right, suffix = query.ids, document.ids, self._suffix
        length = self._fixed + query.length + document.length + len(suffix)
        # At the limit itself, sentence-transformers writes the suffix over the end of the document as well.
        if length > max_length or (length == max_length and len(self._tail)):
            suffix = self._cut_suffix
            room = max_length - self._fixed - len(suffix)
            if len(left) + self._document_lead < room:
                right = right[: room - len(left)]
            else:
                left, right = self._cut_both(query, document, room)
        ids = np.concatenate((self._prefix, left, self._between, right, suffix))
        return TokenSequence(ids, len(ids))

    def _cut_both(self, query: EncodedText, document: EncodedText, room: int) -> tuple[Ids, Ids]:
        lead = self._document_lead
        template = query.head + len(self._mark) + lead
        if room - template < 2:
            least = self._fixed + len(self._cut_suffix) + template + 2
            raise NoRoomError(
                f"max_length {room - template - 2 + least} leaves no room for both texts beside the template with this "
                f"instruction; the least is {least}"
            )
        text, kept = query_and_document(
            len(query.ids) - query.head - len(self._mark), len(document.ids) - lead, room - template
        )
        # The mark's first character may share a token with the query's last one, so the mark's own ids are appended.
        return np.concatenate((query.ids[: query.head + text], self._mark)), document.ids[: lead + kept]

    def _head(self, instruction: str | None) -> Ids:
        opening = self._template.opening(self.default_instruction if instruction is None else instruction)
        return tokenize(self._tokenizer, [opening])[0]

    def _parts_are_exact(self) -> bool:
        """Whether texts tokenized by themselves give the tokens of the whole template; tried on awkward texts."""
        pairs = [(text, "a b") for text in AWKWARD] + [("a b", text) for text in AWKWARD]
        queries = self.encode_queries([query for query, _ in pairs], None)
        documents = self.encode_documents([document for _, document in pairs])
        bodies = [self._template.body(self.default_instruction, query, document) for query, document in pairs]
        return all(
            np.array_equal(
                np.concatenate((query.ids, self._between, document.ids)),
                np.concatenate(tokenize(self._tokenizer, body)),
            )
            for query, document, body in zip(queries, documents, bodies, strict=True)
        )
