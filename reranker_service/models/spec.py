"""What a model is, read from its own files: kind, layout, length limits, pooling and prompts.

Nothing is configured by hand: a model either says in its files how it has to be used, or it is refused with a message
that says what was found and what would be right. No weights are loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from tokenizers import Tokenizer, normalizers

# transformers takes seconds to import. The server answers probes, and finds most of what is wrong, before that.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ModelKind = Literal["cross-encoder", "causal-reranker", "bi-encoder"]
Pooling = Literal["mean", "cls", "lasttoken", "max"]

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
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "pytorch_model*.bin"]


class UnsupportedModelError(ValueError):
    """The model can't be served; the message says what was found and what would be right."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be served.

    Attributes:
        name: The hub's name, or the last part of the directory.
        path: Directory with the configuration, the weights and the tokenizer.
        kind: How the model turns texts into a score.
        model_type: The ``model_type`` of its configuration, such as ``"bert"``.
        architecture: The class that its weights were saved from, such as ``"BertForSequenceClassification"``.
        max_length: Longest input that the model can take, in tokens, special and template tokens included.
        default_length: The length limit that the model's own files or model card set, in tokens; at most
            ``max_length``.
        answers: Token ids of "yes" and "no" for a causal reranker in its original layout, whose score is
            ``logit(yes) - logit(no)``; ``None`` for all others, whose score comes from a head of one label.
        pooling: How a bi-encoder makes one vector from its token vectors; ``None`` for all others.
        query_prompt: What the model was trained to see in front of every query (not for causal rerankers).
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


def read_model(model: str, kind: str | None = None) -> ModelSpec:
    """Find out what a model is.

    Args:
        model: A directory, or the name of a model on the hub, which is then fetched.
        kind: One of ``ModelKind``, where the model's own files should not decide.

    Raises:
        UnsupportedModelError: There is no such model, or it can't be served.
    """
    if kind is not None and kind not in get_args(ModelKind):
        raise UnsupportedModelError(f"model kind {kind!r} is unknown; known are {', '.join(get_args(ModelKind))}")
    files = _Files.read(model)
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
    )
    if found == "cross-encoder":
        return _cross_encoder(files, spec)
    return _causal_reranker(files, spec) if found == "causal-reranker" else _bi_encoder(files, spec)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UnsupportedModelError: There is none, or none of the fast kind.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{path.name}: its tokenizer can't be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{path.name}: {type(tokenizer).__name__} is not a fast tokenizer; one that can be saved as tokenizer.json "
            "is needed"
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def plain_tokenizer(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of a model's fast tokenizer that neither cuts nor pads, with the model's own lower-casing.

    Nothing changes its state later, so that any number of threads may use it at once.
    """
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    if spec.lower_case and not _lower_cases(plain):
        parts = [normalizers.Lowercase()]
        plain.normalizer = normalizers.Sequence([*parts, plain.normalizer] if plain.normalizer else parts)
    return plain


def _lower_cases(tokenizer: Tokenizer) -> bool:
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "Lowercase" or part.get("lowercase") for part in parts)


@dataclass(frozen=True)
class _Files:
    """What a model's directory says.

    Attributes:
        model: What the user asked for; begins every message.
        root: The directory.
        path: The part of it with configuration, weights and tokenizer.
        modules: Class name and folder of each sentence-transformers module; empty for a plain transformers model.
        family: Settings of the whole model, as sentence-transformers saved them.
        architecture: The class that the weights were saved from.
    """

    model: str
    root: Path
    path: Path
    modules: list[tuple[str, str]]
    family: dict[str, Any]
    config: PreTrainedConfig
    architecture: str
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, model: str) -> _Files:
        root = _directory(model)
        modules = _modules(root)
        path = root / modules[0][1] if modules else root
        config = _config(path)
        family = _json(root / "config_sentence_transformers.json")
        architecture = (config.architectures or ["a model of unknown architecture"])[0]
        return cls(model, root, path, modules, family, config, architecture, load_tokenizer(path))

    def refuse(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.model}: {reason}")

    def need_modules(self, known: set[str]) -> None:
        names = [name for name, _ in self.modules]
        if set(names) - known or names.count("Transformer") > 1:
            supported = ", ".join(sorted(known))
            raise self.refuse(f"modules.json names {', '.join(names)}; a model of this kind may have only {supported}")

    def need_one_label(self) -> None:
        if self.config.num_labels != 1:
            raise self.refuse(f"a classifier with {self.config.num_labels} labels; a reranker has one (num_labels = 1)")


def _directory(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UnsupportedModelError(f"{model!r} is neither a directory nor a hub's name of the form 'owner/model'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UnsupportedModelError(
            f"{model!r} is no directory here, and fetching it from the hub failed ({type(error).__name__}: {error}); "
            "give the directory of a downloaded model where there is no hub"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def _modules(root: Path) -> list[tuple[str, str]]:
    """Class name and folder of each sentence-transformers module; empty for a plain transformers model."""
    path = root / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"modules.json can't be read: {error!r}") from error
    if not modules or modules[0][0] != "Transformer":
        first = modules[0][0] if modules else "nothing"
        raise UnsupportedModelError(f"modules.json begins with {first}; only models that begin with Transformer work")
    return modules


def _config(path: Path) -> PreTrainedConfig:
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(f"{path.name} holds no config.json: not a model of transformers")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{path.name}: its config.json can't be used: {error}") from error
    return cast("PreTrainedConfig", config)


def _find_kind(files: _Files) -> ModelKind:
    reads_pairs = files.architecture.endswith("ForSequenceClassification")
    family = files.family.get("model_type", "SentenceTransformer")
    if files.modules and not reads_pairs and family == "SentenceTransformer":
        return "bi-encoder"
    if files.architecture in ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"):
        return "causal-reranker"
    if reads_pairs:
        return "cross-encoder"
    if files.modules:
        raise files.refuse(
            f"a {family} of {files.architecture}; needed is a SentenceTransformer, or a CrossEncoder of a "
            "*ForSequenceClassification or Qwen3ForCausalLM"
        )
    raise files.refuse(
        f"{files.architecture} without modules.json says neither that it reads pairs nor how it embeds texts; needed "
        "is a *ForSequenceClassification with one label, Qwen3-Reranker, or a model that sentence-transformers saved "
        "(the kind 'bi-encoder', if set, takes the mean of the token vectors)"
    )


def _positions(config: PreTrainedConfig) -> int:
    positions = int(config.max_position_embeddings)
    if config.model_type in _POSITIONS_AFTER_PADDING:
        return positions - int(config.pad_token_id or 0) - 1
    return positions


def _cross_encoder(files: _Files, spec: ModelSpec) -> ModelSpec:
    if spec.model_type not in ENCODERS or not spec.architecture.endswith("ForSequenceClassification"):
        raise files.refuse(
            f"{spec.architecture} is no cross-encoder that is known here; known are *ForSequenceClassification of "
            f"{', '.join(sorted(ENCODERS))}"
        )
    files.need_one_label()
    files.need_modules({"Transformer"})
    prompts = files.family.get("prompts") or {}
    return replace(spec, query_prompt=prompts.get(files.family.get("default_prompt_name")) or "")


def _causal_reranker(files: _Files, spec: ModelSpec) -> ModelSpec:
    spec = replace(spec, default_length=min(spec.max_length, CAUSAL_DEFAULT_LENGTH))
    if spec.architecture == "Qwen3ForSequenceClassification":
        files.need_one_label()
        files.need_modules({"Transformer"})
        return spec
    if spec.architecture != "Qwen3ForCausalLM":
        raise files.refuse(
            f"{spec.architecture} is no causal reranker that is known here; known is Qwen3-Reranker "
            "(Qwen3ForCausalLM, or Qwen3ForSequenceClassification with one label)"
        )
    files.need_modules({"Transformer", "LogitScore"})
    vocabulary = files.tokenizer.get_vocab()
    if "yes" not in vocabulary or "no" not in vocabulary:
        raise files.refuse("its vocabulary lacks 'yes' or 'no', the answers of Qwen3-Reranker")
    answers = (vocabulary["yes"], vocabulary["no"])
    for name, folder in files.modules:
        if name == "LogitScore":
            score = _json(files.root / folder / "config.json")
            if (score.get("true_token_id"), score.get("false_token_id")) != answers:
                raise files.refuse("its LogitScore compares other tokens than 'yes' and 'no'")
    return replace(spec, answers=answers)


def _bi_encoder(files: _Files, spec: ModelSpec) -> ModelSpec:
    if spec.model_type not in ENCODERS | {"qwen3"} or spec.architecture.endswith("ForSequenceClassification"):
        raise files.refuse(
            f"{spec.architecture} is no bi-encoder that is known here; known are models of "
            f"{', '.join(sorted(ENCODERS | {'qwen3'}))} without a classification head"
        )
    files.need_modules({"Transformer", "Pooling", "Normalize"})
    folders = dict(files.modules)
    if folders and "Pooling" not in folders:
        raise files.refuse("modules.json names no Pooling, so a text has no one vector")
    saved = sorted(files.path.glob("sentence_*_config.json")) if files.modules else []
    transformer = _json(saved[0]) if saved else {}
    for key in ("query_expansion", "query_length", "document_length", "processing_kwargs"):
        if transformer.get(key):
            raise files.refuse(f"{key} = {transformer[key]!r} in {saved[0].name} is not supported")
    prompts = files.family.get("prompts") or {}
    usual = prompts.get(files.family.get("default_prompt_name"))
    query = prompts.get("query", usual) or ""
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), usual) or ""
    pooling = _json(files.root / folders["Pooling"] / "config.json") if folders else {}
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
        lower_case=bool(transformer.get("do_lower_case")),
    )
