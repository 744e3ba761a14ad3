"""Reading: makes the description of a model from the model's own files, or refuses the model.

A refusal says what was found and what would be right. No weights are loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from .families import FAMILIES, family_of_hub_name
from .hub import ModelFiles
from .kinds import bi_encoder, causal_reranker, cross_encoder, registered
from .saved import saved_settings
from .spec import ModelKind, ModelSpec, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILY_KEY = "reranker_family"
"""Key of config.json with which a bare causal language model names its family."""

_UNLIMITED = 32_768
_POSITIONS_AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})


def read_model(
    model: str,
    kind: str | None = None,
    *,
    family: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
    prompts: Mapping[str, str] | None = None,
) -> ModelSpec:
    """Read the description of a model.

    Args:
        model: A directory, or the name of a model on the hub, which is then downloaded.
        kind: One of ``ModelKind``; ``None`` if the model's own files decide.
        family: An entry of the registry of families; ``None`` if the model's files or its hub name decide.
        revision: Branch, tag or commit of a model on the hub; ``None`` for the main branch.
        trust_remote_code: Whether Python code in the model's directory may run.
        adapter: Directory of a PEFT adapter that is merged into the weights.
        prompts: Prompts by name, in place of those that the model's files set under the same names.

    Raises:
        UnsupportedModelError: There is no such model, or it can't be served.
    """
    if kind is not None and kind not in get_args(ModelKind):
        raise UnsupportedModelError(f"model kind {kind!r} is unknown; known are {', '.join(get_args(ModelKind))}")
    if family is not None and family not in FAMILIES:
        raise UnsupportedModelError(f"--family {family!r} is unknown; known are {', '.join(FAMILIES)}")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise UnsupportedModelError(f"--adapter {adapter}: no adapter_config.json; give a directory that PEFT saved")
    files = ModelFiles.read(model, revision, trust_remote_code)
    if prompts:
        _override_prompts(files, prompts)
    entry = family or _family_of(files)
    spec = _describe(files, kind, entry)
    if kind is not None and spec.kind != kind:
        raise files.refuse(f"--kind {kind}, but its family {entry} is of the kind {spec.kind}; leave one of them out")
    files.fetch_weights()
    return replace(spec, trust_remote_code=trust_remote_code, adapter=adapter)


def _describe(files: ModelFiles, kind: str | None, entry: str | None) -> ModelSpec:
    found: ModelKind = "causal-reranker" if entry else cast(ModelKind, kind) if kind else _find_kind(files)
    positions = _positions(files)
    spec = ModelSpec(
        name=files.model if files.root != Path(files.model).expanduser() else files.root.resolve().name,
        path=files.path,
        kind=found,
        model_type=files.config.model_type,
        architecture=files.architecture,
        max_length=positions,
        default_length=min(positions, files.tokenizer.model_max_length),
        hidden_size=_hidden_size(files.config),
        saved=saved_settings(files),
        root=files.root,
    )
    if entry is not None:
        return registered(files, spec, entry)
    if found == "cross-encoder":
        return cross_encoder(files, spec)
    return causal_reranker(files, spec) if found == "causal-reranker" else bi_encoder(files, spec)


def _override_prompts(files: ModelFiles, prompts: Mapping[str, str]) -> None:
    saved = files.family.get("prompts")
    files.family["prompts"] = {**(saved if isinstance(saved, dict) else {}), **prompts}
    if files.family.get("default_prompt_name") is None and "query" in prompts and not _is_sentence_transformer(files):
        # A CrossEncoder uses no prompt but the default one.
        files.family["default_prompt_name"] = "query"


def _is_sentence_transformer(files: ModelFiles) -> bool:
    return bool(files.modules) and files.family.get("model_type", "SentenceTransformer") == "SentenceTransformer"


def _family_of(files: ModelFiles) -> str | None:
    """The entry of the registry that a model belongs to, by its files or else by its name on the hub."""
    named = getattr(files.config, FAMILY_KEY, None)
    if named is not None:
        if named not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise files.refuse(f"config.json names the {FAMILY_KEY} {named!r}, which is unknown; known are {known}")
        return str(named)
    if files.modules or Path(files.model).expanduser().is_dir():
        # Modules of sentence-transformers say more than a name, and a directory has no name on the hub.
        return None
    return family_of_hub_name(files.model)


def _find_kind(files: ModelFiles) -> ModelKind:
    reads_pairs = files.architecture.endswith("ForSequenceClassification")
    family = files.family.get("model_type", "SentenceTransformer")
    if _is_sentence_transformer(files) and not reads_pairs:
        return "bi-encoder"
    if files.modules and family == "CrossEncoder" and "LogitScore" in dict(files.modules):
        return "causal-reranker"
    if reads_pairs or (files.modules and family == "CrossEncoder"):
        return "cross-encoder"
    if files.modules:
        raise files.refuse(
            f"a {family} of {files.architecture}, which gives more than one number a pair; needed is a "
            "SentenceTransformer or a CrossEncoder with one label"
        )
    if files.architecture.endswith("ForCausalLM"):
        raise files.refuse(
            f"{files.architecture} generates text, and nothing in its files says that it is a reranker. A reranker "
            "that sentence-transformers saved has modules.json with a LogitScore, and a chat template with the roles "
            "query and document. If it belongs to one of the families that publish bare models, name it: --family "
            f"{' or '.join(FAMILIES)}"
        )
    raise files.refuse(
        f"{files.architecture} without modules.json says neither that it reads pairs nor how it embeds texts; needed "
        "is a *ForSequenceClassification with one label, a reranker of a known --family, or a model that "
        "sentence-transformers saved; --kind bi-encoder serves it with the mean of its token vectors"
    )


def _positions(files: ModelFiles) -> int:
    """Longest input in tokens: that of the configuration, or without one that of the tokenizer."""
    config = files.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        # The tokenizer of a model without a limit names 1e30.
        return min(int(files.tokenizer.model_max_length), _UNLIMITED)
    if config.model_type in _POSITIONS_AFTER_PADDING:
        return positions - int(config.pad_token_id or 0) - 1
    return positions


def _hidden_size(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    names = ("hidden_size", "d_model", "dim", "n_embd")
    return next((size for name in names if isinstance(size := getattr(text, name, None), int)), 0)
