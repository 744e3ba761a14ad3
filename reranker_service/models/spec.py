"""Description of a model that can be served: kind, lengths, pooling, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ModelKind = Literal["cross-encoder", "causal-reranker", "bi-encoder"]
Pooling = Literal["mean", "cls", "lasttoken", "max"]


class UnsupportedModelError(ValueError):
    """The model can't be served. The message says what was found and what would be right."""


@dataclass(frozen=True)
class SavedSettings:
    """Settings that sentence-transformers saves with a model. They describe the model and change no score.

    Attributes:
        activation: Function that makes the score of the raw score, "sigmoid" or "identity"; ``None`` if none is named.
        prompts: Prompts by name.
        default_prompt_name: Name of the prompt of callers that name none; ``None`` if there is none.
        similarity: Function that compares two embeddings, "cosine" or "dot"; ``None`` if none of them is named.
    """

    activation: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str | None = None


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
        answers: Token ids of the answers "relevant" and "not relevant" of a causal language model, whose score is the
            first one's logit minus the second one's, or the first one's alone if the second is ``None``. ``None`` for
            all other models, whose score comes from a head of one label or from ``chain``.
        pooling: The way in which a bi-encoder makes one vector of its token vectors; ``None`` for all others.
        query_prompt: Text that the model was trained to see before every query. For a model with a template: the
            instruction of requests that set none; empty if the template's own holds.
        document_prompt: The same for documents of a bi-encoder.
        dimensions: Leading dimensions of the embedding that are used, or ``None`` for all.
        normalized: Whether a bi-encoder's embeddings get norm 1, so that the score is a cosine; if false, the score is
            the dot product.
        lower_case: Whether texts are lower-cased before the tokenizer's own normalization.
        hidden_size: Width of the token vectors.
        saved: Settings in the model's own files that clients may want to know.
        root: The directory of the whole model: ``path``, or the directory that has it as a folder.
        chain: Class name and folder below ``root`` of each sentence-transformers module that makes the score from the
            transformer's token vectors; empty if the transformer's own head or the pooling does.
        family: Name of the model's entry in the registry of families; ``None`` if the model's files say everything.
        library_input: Whether the model's input is the one that sentence-transformers makes. It is joined from the
            texts' token ids if that is proved to give the same.
        library_model: Whether sentence-transformers runs the whole model.
        trust_remote_code: Whether Python code in the model's directory may run.
        adapter: Directory of a PEFT adapter that is merged into the weights; ``None`` for none.
    """

    name: str
    path: Path
    kind: ModelKind
    model_type: str
    architecture: str
    max_length: int
    default_length: int
    answers: tuple[int, int | None] | None = None
    pooling: Pooling | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    dimensions: int | None = None
    normalized: bool = True
    lower_case: bool = False
    hidden_size: int = 0
    saved: SavedSettings = field(default_factory=SavedSettings)
    root: Path | None = field(default=None, compare=False)
    chain: tuple[tuple[str, str], ...] = ()
    family: str | None = None
    library_input: bool = False
    library_model: bool = False
    trust_remote_code: bool = False
    adapter: Path | None = None
