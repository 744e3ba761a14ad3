"""Reading: makes the description of a model from the model's own files, or refuses the model.

A refusal says what was found and what would be right. No weights are loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from .hub import ModelFiles, read_json
from .saved import saved_settings
from .spec import ModelKind, ModelSpec, Pooling, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL_DEFAULT_LENGTH = 8192
"""Tokens; ``max_length`` in the model card of Qwen3-Reranker."""

ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "roberta",
        "xlm-roberta",
    }
)
"""Values of ``model_type`` that cross-encoders and bi-encoders may have."""

_POSITIONS_AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})
_POOLINGS: Mapping[str, Pooling] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean",  # a multiple of the mean: the same unit vector
    "lasttoken": "lasttoken",
}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_model(model: str, kind: str | None = None) -> ModelSpec:
    """Read the description of a model.

    Args:
        model: A directory, or the name of a model on the hub, which is then downloaded.
        kind: One of ``ModelKind``; ``None`` if the model's own files decide.

    Raises:
        UnsupportedModelError: There is no such model, or it can't be served.
    """
    if kind is not None and kind not in get_args(ModelKind):
        raise UnsupportedModelError(f"model kind {kind!r} is unknown; known are {', '.join(get_args(ModelKind))}")
    files = ModelFiles.read(model)
    found = cast(ModelKind, kind) if kind else _find_kind(files)
    positions = _positions(files.config)
    spec = ModelSpec(
        name=model if files.root != Path(model).expanduser() else files.root.resolve().name,
        path=files.path,
        kind=found,
        model_type=files.config.model_type,
        architecture=files.architecture,
        max_length=positions,
        default_length=min(positions, files.tokenizer.model_max_length),
        hidden_size=files.config.hidden_size,
        saved=saved_settings(files),
        root=files.root,
    )
    if found == "cross-encoder":
        return _cross_encoder(files, spec)
    return _causal_reranker(files, spec) if found == "causal-reranker" else _bi_encoder(files, spec)


def _find_kind(files: ModelFiles) -> ModelKind:
    reads_pairs = files.architecture.endswith("ForSequenceClassification")
    family = files.family.get("model_type", "SentenceTransformer")
    if files.modules and not reads_pairs and family == "SentenceTransformer":
        return "bi-encoder"
    if files.architecture in ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"):
        return "causal-reranker"
    if reads_pairs or (files.modules and family == "CrossEncoder"):
        return "cross-encoder"
    if files.modules:
        raise files.refuse(
            f"a {family} of {files.architecture}; needed is a SentenceTransformer, or a CrossEncoder of a "
            "*ForSequenceClassification, of Qwen3ForCausalLM, or of an encoder with a chain of modules that ends in a "
            "Dense for the score"
        )
    raise files.refuse(
        f"{files.architecture} without modules.json says neither that it reads pairs nor how it embeds texts; needed "
        "is a *ForSequenceClassification with one label, Qwen3-Reranker, or a model that sentence-transformers saved; "
        "--kind bi-encoder serves it with the mean of its token vectors"
    )


def _positions(config: PreTrainedConfig) -> int:
    positions = int(config.max_position_embeddings)
    if config.model_type in _POSITIONS_AFTER_PADDING:
        return positions - int(config.pad_token_id or 0) - 1
    return positions


def _cross_encoder(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    if files.modules and not spec.architecture.endswith("ForSequenceClassification"):
        return _chain(files, spec)
    if spec.model_type not in ENCODERS or not spec.architecture.endswith("ForSequenceClassification"):
        raise files.refuse(
            f"{spec.architecture} is no cross-encoder that can be served; supported are *ForSequenceClassification of "
            f"{', '.join(sorted(ENCODERS))}"
        )
    files.need_one_label()
    files.need_modules({"Transformer"})
    prompts = files.family.get("prompts") or {}
    return replace(spec, query_prompt=prompts.get(files.family.get("default_prompt_name")) or "")


def _chain(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A CrossEncoder whose score comes from modules behind a transformer without a head, such as Ettin's rerankers."""
    if spec.model_type not in ENCODERS:
        raise files.refuse(f"{spec.architecture} is no encoder that can be served; known are {', '.join(ENCODERS)}")
    files.need_modules({"Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout"})
    chain = files.modules[1:]
    scores = [read_json(files.root / folder / "config.json") for name, folder in chain if name == "Dense"]
    last = next((one for one in reversed(scores) if one.get("module_output_name") == "scores"), None)
    if last is None or last.get("out_features") != 1 or "Pooling" not in dict(chain):
        raise files.refuse(
            f"modules.json names {', '.join(name for name, _ in files.modules)}; a chain that makes a score has a "
            'Pooling, and a Dense with module_output_name "scores" and one output feature'
        )
    saved = read_json(files.path / "sentence_bert_config.json")
    prompts = files.family.get("prompts") or {}
    return replace(
        spec,
        chain=tuple(chain),
        default_length=min(spec.max_length, int(saved.get("max_seq_length") or spec.default_length)),
        query_prompt=prompts.get(files.family.get("default_prompt_name")) or "",
    )


def _causal_reranker(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    spec = replace(spec, default_length=min(spec.max_length, CAUSAL_DEFAULT_LENGTH))
    if spec.architecture == "Qwen3ForSequenceClassification":
        files.need_one_label()
        files.need_modules({"Transformer"})
        return spec
    if spec.architecture != "Qwen3ForCausalLM":
        raise files.refuse(
            f"{spec.architecture} is no causal reranker that can be served; supported is Qwen3-Reranker "
            "(Qwen3ForCausalLM, or Qwen3ForSequenceClassification with one label)"
        )
    files.need_modules({"Transformer", "LogitScore"})
    vocabulary = files.tokenizer.get_vocab()
    if "yes" not in vocabulary or "no" not in vocabulary:
        raise files.refuse("its vocabulary lacks 'yes' or 'no'; a causal reranker needs both as tokens")
    answers = (vocabulary["yes"], vocabulary["no"])
    for name, folder in files.modules:
        if name == "LogitScore":
            score = read_json(files.root / folder / "config.json")
            if (score.get("true_token_id"), score.get("false_token_id")) != answers:
                raise files.refuse("its LogitScore compares other tokens than 'yes' and 'no'; only these are supported")
    return replace(spec, answers=answers)


def _bi_encoder(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    if spec.model_type not in ENCODERS | {"qwen3"} or spec.architecture.endswith("ForSequenceClassification"):
        raise files.refuse(
            f"{spec.architecture} is no bi-encoder that can be served; supported are models of "
            f"{', '.join(sorted(ENCODERS | {'qwen3'}))} without a classification head"
        )
    files.need_modules({"Transformer", "Pooling", "Normalize"})
    folders = dict(files.modules)
    if folders and "Pooling" not in folders:
        raise files.refuse("modules.json names no Pooling, which a bi-encoder needs to make one vector of a text")
    saved = sorted(files.path.glob("sentence_*_config.json")) if files.modules else []
    transformer = read_json(saved[0]) if saved else {}
    for key in ("query_expansion", "query_length", "document_length", "processing_kwargs"):
        if transformer.get(key):
            raise files.refuse(f"{key} = {transformer[key]!r} in {saved[0].name} is not supported")
    prompts = files.family.get("prompts") or {}
    usual = prompts.get(files.family.get("default_prompt_name"))
    query = prompts.get("query", usual) or ""
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), usual) or ""
    pooling = read_json(files.root / folders["Pooling"] / "config.json") if folders else {}
    if (query or document) and not pooling.get("include_prompt", True):
        raise files.refuse("pooling that leaves out the prompt (include_prompt = false) is not supported")
    modes = pooling.get("pooling_mode") or [name for key, name in _LEGACY_POOLINGS.items() if pooling.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise files.refuse(f"pooling {' + '.join(modes)}; supported is one of {', '.join(_POOLINGS)}")
    return replace(
        spec,
        default_length=min(spec.max_length, int(transformer.get("max_seq_length") or spec.default_length)),
        pooling=_POOLINGS[modes[0]],
        query_prompt=query,
        document_prompt=document,
        dimensions=files.family.get("truncate_dim"),
        normalized=spec.saved.similarity != "dot" or "Normalize" in folders,
        lower_case=bool(transformer.get("do_lower_case")),
    )
