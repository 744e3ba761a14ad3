"""Kinds: describes a model of each kind from its files, or refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .families import FAMILIES
from .hub import ModelFiles, read_json
from .spec import ModelSpec, Pooling

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
"""Values of ``model_type`` for which the server has rules of its own; sentence-transformers runs all other models."""

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


def registered(files: ModelFiles, spec: ModelSpec, entry: str) -> ModelSpec:
    """A model of a family, whose input and answers the registry knows.

    Raises:
        UnsupportedModelError: It is no model of this family.
    """
    family = FAMILIES[entry]
    if spec.architecture not in family.architectures:
        raise files.refuse(
            f"its architecture is {spec.architecture}, and models of the family {entry} are "
            f"{' or '.join(sorted(family.architectures))}"
        )
    spec = replace(
        spec,
        family=entry,
        default_length=min(spec.max_length, family.default_length),
        query_prompt=_default_prompt(files),
    )
    if spec.architecture.endswith("ForSequenceClassification"):
        files.need_one_label()
        files.need_modules({"Transformer"})
        return spec
    files.need_modules({"Transformer", "LogitScore"})
    answers = [None if one is None else _answer_token(files, one) for one in family.answers]
    assert answers[0] is not None
    for name, folder in files.modules:
        if name == "LogitScore":
            score = read_json(files.root / folder / "config.json")
            if [score.get("true_token_id"), score.get("false_token_id")] != answers:
                wanted = " and ".join(repr(one) for one in family.answers if one is not None)
                raise files.refuse(f"its LogitScore compares other tokens than {wanted}, those of the family {entry}")
    return replace(spec, answers=(answers[0], answers[1]))


def _answer_token(files: ModelFiles, answer: str) -> int:
    ids: list[int] = files.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == files.tokenizer.unk_token_id:
        raise files.refuse(f"its vocabulary lacks {answer!r}; a reranker of this family needs it as a token")
    return ids[0]


def _default_prompt(files: ModelFiles) -> str:
    prompts = files.family.get("prompts") or {}
    return str(prompts.get(files.family.get("default_prompt_name")) or "")


def cross_encoder(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A model with a head of one label, or with modules of sentence-transformers that make the score.

    Raises:
        UnsupportedModelError: It gives more than one number a pair, or none.
    """
    if files.modules and not spec.architecture.endswith("ForSequenceClassification"):
        return _chain(files, spec)
    if not spec.architecture.endswith("ForSequenceClassification"):
        raise files.refuse(f"{spec.architecture} is no cross-encoder; supported are *ForSequenceClassification")
    files.need_one_label()
    spec = _with_settings(files, spec)
    if _is_usual(files) and {name for name, _ in files.modules} <= {"Transformer"}:
        return spec
    return _by_library(files, spec)


def _by_library(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A model that sentence-transformers runs as a whole."""
    return replace(spec, chain=tuple(files.modules[1:]), library_input=True, library_model=True)


def _settings(files: ModelFiles) -> dict[str, Any]:
    """Settings of the Transformer module; empty for a model without modules."""
    return read_json(files.path / "sentence_bert_config.json") if files.modules else {}


def _with_settings(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A description with the length limit, the lower-casing and the default prompt that the library saved."""
    saved = _settings(files)
    text = (saved.get("processing_kwargs") or {}).get("text") or {}
    length = text.get("max_length") or saved.get("max_seq_length")
    return replace(
        spec,
        query_prompt=_default_prompt(files),
        lower_case=bool(saved.get("do_lower_case")),
        default_length=min(spec.max_length, int(length)) if length else spec.default_length,
    )


def _is_usual(files: ModelFiles) -> bool:
    """Whether the server's own rules hold for the model: a known encoder, and nothing that would change its input."""
    unusual = files.trust_remote_code or files.tokenizer.chat_template or _settings(files).get("processing_kwargs")
    return files.config.model_type in ENCODERS and not unusual


def _chain(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A CrossEncoder whose score comes from modules behind a transformer without a head, such as Ettin's rerankers."""
    chain = files.modules[1:]
    scores = [read_json(files.root / folder / "config.json") for name, folder in chain if name == "Dense"]
    last = next((one for one in reversed(scores) if one.get("module_output_name") == "scores"), None)
    known = set(dict(chain)) <= {"Pooling", "Dense", "LayerNorm", "Normalize", "Dropout"}
    if known and (last is None or last.get("out_features") != 1 or "Pooling" not in dict(chain)):
        raise files.refuse(
            f"modules.json names {', '.join(name for name, _ in files.modules)}; a chain that makes a score has a "
            'Pooling, and a Dense with module_output_name "scores" and one output feature'
        )
    spec = _with_settings(files, spec)
    _pooling(files, spec.query_prompt)
    return replace(spec, chain=tuple(chain)) if known and _is_usual(files) else _by_library(files, spec)


def _pooling(files: ModelFiles, prompt: str) -> dict[str, Any]:
    """Settings of the Pooling module; empty for a model without one.

    Raises:
        UnsupportedModelError: It leaves out the prompt, and there is one.
    """
    folders = dict(files.modules)
    pooling = read_json(files.root / folders["Pooling"] / "config.json") if "Pooling" in folders else {}
    if prompt and not pooling.get("include_prompt", True):
        raise files.refuse("pooling that leaves out the prompt (include_prompt = false) is not supported")
    return pooling


def causal_reranker(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A CrossEncoder of a causal language model and a LogitScore, with the input of its own chat template.

    Raises:
        UnsupportedModelError: It is something else.
    """
    names = [name for name, _ in files.modules]
    if names != ["Transformer", "LogitScore"]:
        raise files.refuse(
            f"{spec.architecture} with {', '.join(names) or 'no modules.json'} is no causal reranker; needed is a "
            f"causal language model with the modules Transformer and LogitScore, or --family {' or '.join(FAMILIES)}"
        )
    score = read_json(files.root / dict(files.modules)["LogitScore"] / "config.json")
    answers = score.get("true_token_id"), score.get("false_token_id")
    if not isinstance(answers[0], int) or score.get("module_input_name", "causal_logits") != "causal_logits":
        raise files.refuse("its LogitScore names no true_token_id, or reads another feature than causal_logits")
    return replace(
        _with_settings(files, spec),
        answers=(answers[0], answers[1] if isinstance(answers[1], int) else None),
        chain=tuple(files.modules[1:]),
        library_input=True,
    )


def bi_encoder(files: ModelFiles, spec: ModelSpec) -> ModelSpec:
    """A SentenceTransformer.

    Raises:
        UnsupportedModelError: It has no pooling, or a setting that is not supported.
    """
    if spec.architecture.endswith("ForSequenceClassification"):
        raise files.refuse(f"{spec.architecture} has a classification head, and a bi-encoder has none")
    similarity = files.family.get("similarity_fn_name")
    if similarity not in (None, "cosine", "dot"):
        raise files.refuse(
            f'similarity_fn_name = "{similarity}" in config_sentence_transformers.json is not supported; a bi-encoder '
            "that is served compares embeddings by cosine or dot"
        )
    folders = dict(files.modules)
    saved = sorted(files.path.glob("sentence_*_config.json")) if files.modules else []
    transformer = read_json(saved[0]) if saved else {}
    for key in ("query_expansion", "query_length", "document_length", "processing_kwargs"):
        if transformer.get(key):
            raise files.refuse(f"{key} = {transformer[key]!r} in {saved[0].name} is not supported")
    prompts = files.family.get("prompts") or {}
    usual = prompts.get(files.family.get("default_prompt_name"))
    query = prompts.get("query", usual) or ""
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), usual) or ""
    pooling = _pooling(files, query or document)
    modes = pooling.get("pooling_mode") or [name for key, name in _LEGACY_POOLINGS.items() if pooling.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    dimensions = files.family.get("truncate_dim")
    ends_normalized = bool(files.modules) and files.modules[-1][0] == "Normalize" and dimensions is None
    spec = replace(
        spec,
        default_length=min(spec.max_length, int(transformer.get("max_seq_length") or spec.default_length)),
        query_prompt=query,
        document_prompt=document,
        dimensions=dimensions,
        normalized=similarity != "dot" or ends_normalized,
        lower_case=bool(transformer.get("do_lower_case")),
    )
    known = len(modes) == 1 and modes[0] in _POOLINGS and set(folders) <= {"Transformer", "Pooling", "Normalize"}
    # Without normalization at the end, a multiple of the mean is another vector, and so is one normalized before.
    known = known and (spec.normalized or (modes[0] != "mean_sqrt_len_tokens" and "Normalize" not in folders))
    # An empty text has no tokens if the tokenizer adds none.
    known = known and (not files.modules or files.tokenizer.num_special_tokens_to_add() > 0)
    if known and ("Pooling" in folders or not folders) and spec.model_type in ENCODERS | {"qwen3"}:
        return replace(spec, pooling=_POOLINGS[modes[0]])
    if not files.modules:
        raise files.refuse(
            f"{spec.architecture} without modules.json; a bi-encoder without is a model of "
            f"{', '.join(sorted(ENCODERS | {'qwen3'}))}"
        )
    if set(folders) <= {"Transformer", "Normalize", "Dense", "Dropout", "LayerNorm"}:
        raise files.refuse("modules.json names no Pooling, which a bi-encoder needs to make one vector of a text")
    width = spec.hidden_size * len(modes)
    for name, folder in files.modules:
        if name == "Dense":
            width = int(read_json(files.root / folder / "config.json").get("out_features", width))
    return replace(
        spec,
        hidden_size=width,
        chain=tuple(files.modules[1:]),
        library_input=True,
        library_model=True,
    )
