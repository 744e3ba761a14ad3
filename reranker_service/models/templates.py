"""The prompt template of Qwen3-Reranker, exactly as its model card gives it.

Source: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, section "Transformers Usage".
"""

from __future__ import annotations

NAME = "qwen3-reranker"
"""Name of the template, for clients."""

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
"""Opens the conversation; tokenized by itself."""

SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Asks for the answer; tokenized by itself. The model's logits after its last token are the score."""

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The instruction of requests that set none."""

DOCUMENT_MARK = "\n<Document>:"
"""Stands between the query and a space with the document."""


def query_head(instruction: str) -> str:
    """The part of the template before a space and the query."""
    return f"<Instruct>: {instruction}\n<Query>:"


def body(instruction: str, query: str, document: str) -> str:
    """The part between prefix and suffix, tokenized as one text."""
    return f"{query_head(instruction)} {query}{DOCUMENT_MARK} {document}"
