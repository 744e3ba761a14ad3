"""Description of a model that can be served: kind, lengths, pooling, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ModelKind = Literal["cross-encoder", "causal-reranker", "bi-encoder"]
Pooling = Literal["mean", "cls", "lasttoken", "max"]


class UnsupportedModelError(ValueError):
    """The model can't be served. The message says what was found and what would be right."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be served.

    Attributes:
        name: The hub's name, or the last part of the directory.
        path: Directory with the configuration, the weights and the tokenizer.
        kind: The way in which the model turns texts into a score.
        model_type: The ``model_type`` of its configuration, such as ``"bert"``.
        architecture: The class that its weights were saved from, such as ``"BertForSequenceClassification"``.
        max_length: Longest input that the model can take, in tokens, special and template tokens included.
        default_length: The length limit that the model's own files or model card set, in tokens; at most
            ``max_length``.
        answers: Token ids of "yes" and "no" for a causal reranker in its original layout, whose score is
            ``logit(yes) - logit(no)``; ``None`` for all others, whose score comes from a head of one label.
        pooling: The way in which a bi-encoder makes one vector of its token vectors; ``None`` for all others.
        query_prompt: Text that the model was trained to see before every query; empty for causal rerankers.
        document_prompt: The same for documents of a bi-encoder.
        dimensions: Leading dimensions of the embedding that are used, or ``None`` for all.
        lower_case: Whether texts are lower-cased before the tokenizer's own normalization.
    """

    name: str
    path: Path
    kind: ModelKind
    model_type: str
    architecture: str
    max_length: int
    default_length: int
    answers: tuple[int, int] | None = None
    pooling: Pooling | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    dimensions: int | None = None
    lower_case: bool = False
