"""A fingerprint changes with everything that changes scores, and only with that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reranker_service.models import fingerprint, read_model

from . import models

ENGINE = {"name": "torch", "dtype": "float32", "versions": {"torch": "2.13.0"}}


def of(model: Path, arguments: dict[str, object] | None = None, **engine: object) -> str:
    return fingerprint(read_model(str(model)), ENGINE | engine, arguments)


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def train(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, model / "model.safetensors")


def rename_tensor(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["other.weight"] = weights.pop("classifier.weight")
    save_file(weights, model / "model.safetensors")


def other_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.build_bert_cross_encoder(tmp_path / "model")


def test_the_fingerprint_is_printable_and_short(model: Path) -> None:
    text = of(model)
    assert len(text) <= 64
    assert all(character in "0123456789abcdef" for character in text)


@pytest.mark.parametrize(
    "change",
    [
        train,
        rename_tensor,
        other_tokenizer,
        edit("config.json", layer_norm_eps=1e-5),
        edit("config.json", hidden_act="relu"),
    ],
)
def test_files_that_change_scores_change_the_fingerprint(change: Callable[[Path], None], model: Path) -> None:
    before = of(model)
    change(model)
    assert of(model) != before


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "vllm"},
        {"dtype": "bfloat16"},
        {"versions": {"torch": "2.14.0"}},
        {"versions": {"vllm": "0.32"}},
        {"arguments": {"quantization": "fp8"}},
    ],
)
def test_the_engine_changes_the_fingerprint(engine: dict[str, object], model: Path) -> None:
    assert of(model, **engine) != of(model)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "causal-reranker"},
        {"query_prompt": "q: "},
        {"pooling": "cls"},
        {"lower_case": True},
        {"dimensions": 8},
        {"answers": (1, 2)},
    ],
)
def test_the_models_description_changes_the_fingerprint(change: dict[str, object], model: Path) -> None:
    spec = read_model(str(model))
    other = replace(spec, **change)  # type: ignore[arg-type]
    assert fingerprint(other, ENGINE) != of(model)


def test_the_original_and_the_converted_causal_reranker_differ(tmp_path: Path) -> None:
    original = models.build_qwen3_reranker(tmp_path / "original")
    converted = models.build_qwen3_reranker_converted(tmp_path / "converted")
    assert of(original) != of(converted)


@pytest.mark.parametrize(
    "change",
    [
        edit("config.json", transformers_version="9.9.9"),
        edit("config.json", _name_or_path="elsewhere"),
        edit("tokenizer_config.json", name_or_path="elsewhere"),
        lambda model: (model / "README.md").write_text("new"),
        lambda model: (model / "optimizer.pt").write_bytes(b"state"),
        lambda model: (model / "model.safetensors").touch(),
    ],
)
def test_changes_without_effect_on_scores_keep_the_fingerprint(change: Callable[[Path], None], model: Path) -> None:
    before = of(model)
    change(model)
    assert of(model) == before


def test_the_models_directory_does_not_change_the_fingerprint(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(model, copy)
    assert of(copy) == of(model)


def test_large_weights_are_sampled(model: Path) -> None:
    """A change in the middle of a large file changes the fingerprint, though the file is not read as a whole."""
    weights = load_file(model / "model.safetensors")
    large = torch.arange(16_000_000, dtype=torch.float32)
    save_file({**weights, "large": large}, model / "model.safetensors")
    before = of(model)
    # Like training, this changes every number a little.
    save_file({**weights, "large": large + torch.randn_like(large)}, model / "model.safetensors")
    assert of(model) != before


def _large_model(model: Path, kind: str) -> dict[str, torch.Tensor]:
    """Give a model weights of 24 MB, of which the scoring head is one two-thousandth; returns them."""
    weights = load_file(model / "model.safetensors")
    torch.manual_seed(0)
    weights = {f"layer.{number:02}": torch.randn(500, 1000) for number in range(12)} | weights
    weights["classifier.weight"], weights["pooler"] = torch.randn(1, 384), torch.randn(384, 384)
    _save(model, kind, weights)
    return weights


def _save(model: Path, kind: str, weights: dict[str, torch.Tensor]) -> None:
    if kind == "safetensors":
        save_file(weights, model / "model.safetensors")
        return
    (model / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias", "pooler", "layer.05"])
def test_a_change_of_any_one_tensor_of_large_weights_changes_the_fingerprint(name: str, kind: str, model: Path) -> None:
    weights = _large_model(model, kind)
    before = of(model)
    _save(model, kind, weights)
    assert of(model) == before
    _save(model, kind, weights | {name: weights[name] * -3})
    assert of(model) != before


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x05\0\0\0\0\0\0\0{]\n\n\n", b"\x02\0\0\0\0\0\0\0[]", b""])
def test_damaged_weights_have_a_fingerprint(damage: bytes, model: Path) -> None:
    (model / "model.safetensors").write_bytes(damage + bytes(5 << 20))
    before = of(model)
    (model / "model.safetensors").write_bytes(damage + bytes((5 << 20) - 1) + b"\1")
    assert of(model) != before
