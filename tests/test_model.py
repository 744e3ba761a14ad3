"""Models are described from their own files; a model that cannot be served is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from reranker_service.loading import choose_model
from reranker_service.models import UnsupportedModelError, read_model
from reranker_service.settings import Settings

from . import models


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; ``None`` takes a field away."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("build", "kind", "max_length", "default_length"),
    [
        (models.build_bert_cross_encoder, "cross-encoder", 128, 128),
        # 130 positions, two of which are reserved for padding.
        (models.build_roberta_cross_encoder, "cross-encoder", 128, 128),
        (models.build_xlm_roberta_cross_encoder, "cross-encoder", 128, 128),
        (models.build_qwen3_reranker, "causal-reranker", 1024, 1024),
        (models.build_qwen3_reranker_converted, "causal-reranker", 1024, 1024),
        (models.build_bi_encoder, "bi-encoder", 128, 64),
    ],
)
def test_kind_and_lengths(build, kind: str, max_length: int, default_length: int, tmp_path: Path) -> None:
    spec = read_model(str(build(tmp_path / "name")))
    assert (spec.name, spec.kind) == ("name", kind)
    assert (spec.max_length, spec.default_length) == (max_length, default_length)


def test_the_real_bi_encoder() -> None:
    spec = read_model(str(models.all_minilm()))
    assert (spec.kind, spec.pooling, spec.max_length, spec.default_length) == ("bi-encoder", "mean", 512, 256)


def test_both_layouts_of_the_causal_reranker(tmp_path: Path) -> None:
    original = read_model(str(models.build_qwen3_reranker(tmp_path / "original")))
    converted = read_model(str(models.build_qwen3_reranker_converted(tmp_path / "converted")))
    vocabulary = models.qwen_tokenizer().get_vocab()
    assert original.answers == (vocabulary["yes"], vocabulary["no"])
    assert converted.answers is None


def test_the_model_cards_length_of_a_long_causal_reranker(tmp_path: Path) -> None:
    model = models.build_qwen3_reranker(tmp_path)
    edit(model / "config.json", max_position_embeddings=40960)
    spec = read_model(str(model))
    assert (spec.max_length, spec.default_length) == (40960, 8192)


@pytest.mark.parametrize("build", [models.build_bert_cross_encoder, models.build_qwen3_reranker])
def test_models_that_sentence_transformers_saved_as_cross_encoders(build, tmp_path: Path) -> None:
    plain = read_model(str(build(tmp_path / "plain")))
    CrossEncoder(str(plain.path)).save_pretrained(str(tmp_path / "saved"))
    saved = read_model(str(tmp_path / "saved"))
    # What sentence-transformers adds when it saves a model describes it, and changes no score.
    assert replace(saved, saved=plain.saved) == replace(plain, name="saved", path=tmp_path / "saved")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_models_that_sentence_transformers_saved_as_bi_encoders(pooling: str, tmp_path: Path) -> None:
    prompts = {"query": "search: ", "document": "text: "}
    plain = read_model(str(models.build_bi_encoder(tmp_path / "plain", pooling=pooling, prompts=prompts)))
    assert plain.pooling == pooling
    assert (plain.query_prompt, plain.document_prompt) == ("search: ", "text: ")
    SentenceTransformer(str(plain.path)).save_pretrained(str(tmp_path / "saved"))
    saved = read_model(str(tmp_path / "saved"))
    # What sentence-transformers adds when it saves a model describes it, and changes no score.
    assert replace(saved, saved=plain.saved) == replace(plain, name="saved", path=tmp_path / "saved")


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, ("", "")),
        ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
        ({"query": "q: ", "document": "d: ", "passage": "p: "}, None, ("q: ", "d: ")),
        ({"query": "q: ", "usual": "u: "}, "usual", ("q: ", "u: ")),
        ({"query": "q: ", "usual": "u: "}, None, ("q: ", "")),
    ],
)
def test_prompts(prompts: dict[str, str], default: str | None, expected: tuple[str, str], tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path, prompts=prompts)
    edit(model / "config_sentence_transformers.json", default_prompt_name=default)
    spec = read_model(str(model))
    assert (spec.query_prompt, spec.document_prompt) == expected


def test_weights_in_a_folder_of_the_transformer(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path)
    folder = model / "0_Transformer"
    folder.mkdir()
    for path in [
        *model.glob("*.safetensors"),
        *model.glob("*token*"),
        *model.glob("*bert_config*"),
        model / "config.json",
    ]:
        path.rename(folder / path.name)
    modules = json.loads((model / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (model / "modules.json").write_text(json.dumps(modules))
    spec = read_model(str(model))
    assert (spec.path, spec.default_length) == (folder, 64)


def test_the_kind_can_be_set(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path)
    (model / "modules.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"BertModel without modules\.json"):
        read_model(str(model))
    assert read_model(str(model), "bi-encoder").pooling == "mean"
    with pytest.raises(UnsupportedModelError, match="no cross-encoder"):
        read_model(str(model), "cross-encoder")
    with pytest.raises(UnsupportedModelError, match="known are cross-encoder, causal-reranker, bi-encoder"):
        read_model(str(model), "reranker")


def change_config(**changes: object):
    return lambda model: edit(model / "config.json", **changes)


def change_modules(*kinds: str):
    def change(model: Path) -> None:
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for number, kind in enumerate(kinds, 1):
            reference = kind if "." in kind else f"sentence_transformers.models.{kind}"
            modules.append({"idx": number, "name": str(number), "path": f"{number}_{kind}", "type": reference})
        (model / "modules.json").write_text(json.dumps(modules))

    return change


def change_pooling(**changes: object):
    return lambda model: edit(model / "1_Pooling" / "config.json", **changes)


def other_answers(model: Path) -> None:
    change_modules("LogitScore")(model)
    edit(model / "config_sentence_transformers.json", model_type="CrossEncoder")
    (model / "1_LogitScore").mkdir()
    edit(model / "1_LogitScore" / "config.json", true_token_id=5, false_token_id=6)


def other_similarity(name: object) -> Callable[[Path], None]:
    return lambda model: edit(model / "config_sentence_transformers.json", similarity_fn_name=name)


CROSS, CAUSAL, BI = models.build_bert_cross_encoder, models.build_qwen3_reranker, models.build_bi_encoder


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (CROSS, change_config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}), "2 labels.*one"),
        (CROSS, change_config(model_type="nonsense"), r"config\.json can't be used"),
        (CROSS, change_config(architectures=["BertForMaskedLM"]), r"without modules\.json"),
        (CROSS, change_config(architectures=None), "unknown architecture"),
        (CROSS, lambda model: (model / "config.json").unlink(), r"no config\.json"),
        (CROSS, lambda model: (model / "config.json").write_text("{"), r"config\.json can't be used"),
        (CROSS, lambda model: edit(model / "tokenizer_config.json", tokenizer_class="CanineTokenizer"), "not a fast"),
        (CAUSAL, change_config(architectures=["Qwen3ForTokenClassification"]), "of the family qwen3-reranker are"),
        (CAUSAL, other_answers, "other tokens than 'yes' and 'no'"),
        (BI, change_modules("Normalize"), "no Pooling"),
        (BI, change_modules("own.Pooling", "Normalize"), "own.Pooling, which is Python code.*--trust-remote-code"),
        (BI, lambda model: edit(model / "sentence_bert_config.json", query_length=8), "query_length = 8"),
        (BI, other_similarity("euclidean"), 'similarity_fn_name = "euclidean".*not supported.*by cosine or dot'),
        (BI, other_similarity(7), 'similarity_fn_name = "7".*not supported.*by cosine or dot'),
        (BI, lambda model: edit(model / "config_sentence_transformers.json", model_type="SparseEncoder"), "Sparse"),
        (BI, lambda model: (model / "modules.json").write_text("[]"), "begins with nothing"),
        (BI, lambda model: (model / "modules.json").write_text("{]"), r"modules\.json can't be read"),
    ],
)
def test_models_that_cannot_be_served_are_refused(build, change, message: str, tmp_path: Path) -> None:
    model = build(tmp_path)
    read_model(str(model))
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(str(model))


def test_a_multiple_of_the_mean_is_the_mean_only_if_embeddings_are_normalized(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path, normalize=False)
    change_pooling(pooling_mode="mean_sqrt_len_tokens")(model)
    assert read_model(str(model)).pooling == "mean"
    edit(model / "config_sentence_transformers.json", similarity_fn_name="dot")
    spec = read_model(str(model))
    assert (spec.normalized, spec.pooling, spec.library_model) == (False, None, True)


def test_a_prompt_that_pooling_leaves_out_is_refused(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path, prompts={"query": "q: "})
    change_pooling(include_prompt=False)(model)
    with pytest.raises(UnsupportedModelError, match="include_prompt"):
        read_model(str(model))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "neither a directory nor"),
        ("nowhere", "neither a directory nor"),
        ("some/where/else", "neither a directory nor"),
        # Tests run with HF_HUB_OFFLINE.
        ("owner/model", "is no directory, and its download from the hub failed"),
    ],
)
def test_models_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(name)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    # As for a user who does not own the file; root reads every file whatever its mode.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).suffix != ".safetensors")
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors can't be read by the user .*chmod a\+r"):
        read_model(str(model))


def test_a_shorter_length_for_the_engine_is_a_shorter_length_for_requests(cross_encoder: Path) -> None:
    def lengths(**settings: Any) -> tuple[int, int]:
        spec = choose_model(Settings(model=str(cross_encoder), **settings))
        return spec.max_length, spec.default_length

    longest, default = lengths()
    assert lengths(engine_args={"max_model_len": 32}) == (32, 32)
    assert lengths(engine_args={"max_model_len": longest, "block_size": 32}) == (longest, default)
    assert lengths(engine_args={"max_model_len": 32}, default_length=16) == (32, 16)
    assert lengths(engine_args={"max_model_len": 32}, max_length=16) == (16, 16)
    with pytest.raises(UnsupportedModelError, match="takes at most 32"):
        lengths(engine_args={"max_model_len": 32}, max_length=64)
