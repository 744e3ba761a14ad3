"""Families: rerankers whose files do not say how query and document are placed, and which tokens are the answers.

One entry a family. An entry has the text of the model card, cut into parts that are tokenized by themselves, and the
answer tokens. A new family needs an entry here and a test that compares it with the code on its model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .template import Template


@dataclass(frozen=True)
class Family:
    """A family of causal language models that were trained to rerank.

    Attributes:
        template: The input.
        answers: The token for "relevant", and that for "not relevant" or ``None``. The score is the first one's logit,
            minus the second one's if there is one.
        architectures: Classes of the models that the family's authors publish.
        hub_names: Beginnings of hub names, in lower case, that belong to the family.
        default_length: Tokens; the limit on the model card, with the template included.
    """

    template: Template
    answers: tuple[str, str | None]
    architectures: frozenset[str]
    hub_names: tuple[str, ...]
    default_length: int


# https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, section "Transformers Usage".
QWEN3_RERANKER = Family(
    template=Template(
        name="qwen3-reranker",
        prefix=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        ),
        head="<Instruct>: {instruction}\n<Query>:",
        query=(" ", "\n<Document>:"),
        document=(" ", ""),
        suffix=("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",),
        default_instruction="Given a web search query, retrieve relevant passages that answer the query",
        special_tokens=True,
    ),
    answers=("yes", "no"),
    architectures=frozenset({"Qwen3ForCausalLM", "Qwen3ForSequenceClassification"}),
    hub_names=("qwen/qwen3-reranker-", "tomaarsen/qwen3-reranker-"),
    default_length=8192,
)

# https://github.com/mixedbread-ai/mxbai-rerank, mxbai_rerank/mxbai_rerank_v2.py.
MXBAI_RERANK_V2 = Family(
    template=Template(
        name="mxbai-rerank-v2",
        prefix=(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n",
        ),
        head="instruction: {instruction}\nquery:",
        head_without_instruction="query:",
        query=(" ", ""),
        between=("\n",),
        document_head="document:",
        document=(" ", ""),
        suffix=(
            "\n",
            "You are a search relevance expert who evaluates how well documents match search queries. For each "
            "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
            "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        default_instruction="",
    ),
    answers=("1", "0"),
    architectures=frozenset({"Qwen2ForCausalLM"}),
    hub_names=("mixedbread-ai/mxbai-rerank-base-v2", "mixedbread-ai/mxbai-rerank-large-v2"),
    default_length=8192,
)

# https://huggingface.co/BAAI/bge-reranker-v2-gemma, section "For LLM-based reranker", code for transformers.
BGE_RERANKER_V2_GEMMA = Family(
    template=Template(
        name="bge-reranker-v2-gemma",
        bos=True,
        # Tokens of this tokenizer span words, so that "A: " and the query are tokenized together.
        query=("A: ", ""),
        between=("\n",),
        document=("B: ", ""),
        suffix=(
            "\n",
            "Given a query A and a passage B, determine whether the passage contains an answer to the query by "
            "providing a prediction of either 'Yes' or 'No'.",
        ),
    ),
    answers=("Yes", None),
    architectures=frozenset({"GemmaForCausalLM"}),
    hub_names=("baai/bge-reranker-v2-gemma",),
    default_length=1024,
)

FAMILIES: Mapping[str, Family] = {
    family.template.name: family for family in (QWEN3_RERANKER, MXBAI_RERANK_V2, BGE_RERANKER_V2_GEMMA)
}
"""The entries, by name."""


def family_of_hub_name(model: str) -> str | None:
    """Name of the family that a hub name belongs to; ``None`` if it belongs to none."""
    name = model.lower()
    return next((entry for entry, family in FAMILIES.items() if name.startswith(family.hub_names)), None)
