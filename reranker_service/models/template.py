"""Template: text around a query and a document, in parts that are tokenized by themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """Text around a query and a document.

    The input is prefix, head, query, the texts between, document and suffix. Every string of ``prefix``, ``between``
    and ``suffix`` is a text that is tokenized by itself. The head and the query are one text, and so are document's
    head and document; without texts between, these four are one text.

    Attributes:
        name: Name of the template, for clients.
        prefix: Texts before the instruction.
        head: Text from the instruction to the query, with ``{instruction}``; empty if the model takes no instruction.
        head_without_instruction: The head if the instruction is empty; ``None`` if ``head`` is used then too.
        query: Text directly before and after the query.
        between: Texts after the query and before the document.
        document_head: Text before the document whose tokens do not depend on the document.
        document: Text directly before and after the document.
        suffix: Texts after the document. The logits after its last token are the score.
        default_instruction: The instruction of requests that set none; ``None`` if the model takes no instruction.
        special_tokens: Whether the tokenizer's special tokens of a single text stand before the head and after the
            document.
        bos: Whether the tokenizer's token for the beginning of a text is the first one.
    """

    name: str
    prefix: tuple[str, ...] = ()
    head: str = ""
    head_without_instruction: str | None = None
    query: tuple[str, str] = ("", "")
    between: tuple[str, ...] = ()
    document_head: str = ""
    document: tuple[str, str] = ("", "")
    suffix: tuple[str, ...] = ()
    default_instruction: str | None = None
    special_tokens: bool = False
    bos: bool = False

    def opening(self, instruction: str | None) -> str:
        """The head with an instruction; ``None`` means the default one."""
        if instruction is None:
            instruction = self.default_instruction or ""
        if not instruction and self.head_without_instruction is not None:
            return self.head_without_instruction
        # Not str.format: an instruction may have braces.
        before, _, after = self.head.partition("{instruction}")
        return f"{before}{instruction}{after}" if _ else self.head

    def body(self, instruction: str | None, query: str, document: str) -> tuple[str, ...]:
        """The texts from the head to the document, each of which is tokenized by itself."""
        first = f"{self.opening(instruction)}{self.query[0]}{query}{self.query[1]}"
        second = f"{self.document_head}{self.document[0]}{document}{self.document[1]}"
        return (first, *self.between, second) if self.between else (first + second,)
