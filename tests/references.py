"""Reference scores: from sentence-transformers, and from transformers with the code of Qwen3-Reranker's model card."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import models

CARD_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
CARD_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CARD_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

ODD_PAIRS = [
    ("", ""),
    ("", "a document without a query"),
    ("a query without a document", ""),
    (" leading and trailing ", "\n\nnew lines\t\n"),
    ("x" * 1000, "y" * 1000),
    ("short", "word " * 800),
    ("word " * 60, "another " * 800),
    ("Wo ist Köln? Où est l'été?", "東京は日本の首都です 😀 👩‍👩‍👧 e\u0301 ﬁ Ａ नि \u200b"),
    ("what does [SEP] </s> mean", "[CLS] <s> <|im_end|> 1234567"),
]


def pairs(count: int = 24) -> list[tuple[str, str]]:
    """Real pairs, followed by the odd ones."""
    real = list(models.summary_and_body())
    return random.Random(0).sample(real, count) + ODD_PAIRS


def short_queries() -> list[tuple[str, str]]:
    """Pairs whose query leaves room for a document: with longer ones the model card's code would cut its template."""
    return [(query, document) for query, document in pairs() if len(query) < 200]


def cross_encoder_logits(model: Path, texts: Sequence[tuple[str, str]], max_length: int | None) -> NDArray[np.float32]:
    """Raw logits, shape ``(len(texts),)``."""
    reference = CrossEncoder(str(model), device="cpu")
    if max_length is not None:
        reference.max_seq_length = max_length
    return np.asarray(reference.predict(list(texts), activation_fn=torch.nn.Identity(), batch_size=4))


def causal_logits(
    model: Path, texts: Sequence[tuple[str, str]], instruction: str | None, max_length: int
) -> NDArray[np.float32]:
    """Logit of "yes" minus logit of "no", as the model card computes them, shape ``(len(texts),)``."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    yes, no = tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")
    scores = []
    for query, document in texts:
        ids = torch.tensor([causal_ids(tokenizer, query, document, instruction, max_length)])
        with torch.inference_mode():
            logits = causal(ids).logits[0, -1]
        scores.append(float(logits[yes] - logits[no]))
    return np.array(scores, dtype=np.float32)


def causal_ids(tokenizer, query: str, document: str, instruction: str | None, max_length: int) -> list[int]:
    """The input of Qwen3-Reranker, as its model card makes it."""
    prefix = tokenizer.encode(CARD_PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(CARD_SUFFIX, add_special_tokens=False)
    task = CARD_INSTRUCTION if instruction is None else instruction
    body = tokenizer(
        f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}",
        truncation="longest_first",
        max_length=max_length - len(prefix) - len(suffix),
    )["input_ids"]
    return [*prefix, *body, *suffix]


def embeddings(
    model: Path, texts: Sequence[str], role: str = "document", max_length: int | None = None
) -> NDArray[np.float32]:
    """Unit-norm embeddings, shape ``(len(texts), dim)``."""
    reference = SentenceTransformer(str(model), device="cpu")
    if max_length is not None:
        reference.max_seq_length = max_length
    encode = reference.encode_query if role == "query" else reference.encode_document
    vectors = np.asarray(encode(list(texts), batch_size=4))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)


def mxbai_logits(
    model: Path, texts: Sequence[tuple[str, str]], instruction: str | None = None, max_length: int = 8192
) -> NDArray[np.float32]:
    """Scores of mxbai-rerank-v2 as its own package computes them, shape ``(len(texts),)``.

    ``max_length`` does not count the template around query and document.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str, length: int | None = None) -> list[int]:
        return tokenizer(text, add_special_tokens=False, truncation=length is not None, max_length=length)["input_ids"]

    opening = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    before = ids(opening + "<|im_start|>user\n")
    after = [*ids("\n"), *ids(MXBAI_TASK), *ids("<|im_end|>\n<|im_start|>assistant\n")]
    inputs = []
    for query, document in texts:
        words = f"query: {query}" if not instruction else f"instruction: {instruction}\nquery: {query}"
        first = ids(words, max_length * 3 // 4)
        second = [*ids("\n"), *ids(f"document: {document}", max_length)]
        inputs.append([*before, *first, *second[: max_length - len(first)], *after])
    return _answer_logits(model, inputs, ids("1")[0], ids("0")[0])


def bge_gemma_logits(model: Path, texts: Sequence[tuple[str, str]], max_length: int = 1024) -> NDArray[np.float32]:
    """Scores of bge-reranker-v2-gemma as the code on its model card computes them, shape ``(len(texts),)``.

    ``max_length`` does not count the question after query and document.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str, length: int | None = None) -> list[int]:
        return tokenizer(text, add_special_tokens=False, truncation=length is not None, max_length=length)["input_ids"]

    question = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    inputs = []
    for query, document in texts:
        first = [tokenizer.bos_token_id, *ids(f"A: {query}", max_length * 3 // 4)]
        second = [*ids("\n"), *ids(f"B: {document}", max_length)]
        inputs.append([*first, *second[: max_length - len(first)], *ids("\n"), *ids(question)])
    return _answer_logits(model, inputs, ids("Yes")[0], None)


def _answer_logits(model: Path, inputs: list[list[int]], relevant: int, other: int | None) -> NDArray[np.float32]:
    """The logit of an answer after each input, minus that of the other answer if there is one."""
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    with torch.inference_mode():
        for ids in inputs:
            logits = causal(torch.tensor([ids])).logits[0, -1]
            scores.append(float(logits[relevant] - (0 if other is None else logits[other])))
    return np.array(scores, dtype=np.float32)
