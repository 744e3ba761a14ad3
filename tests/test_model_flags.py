"""Flags that say how a model is read: adapter, code of the model, revision, prompts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from structlog.testing import capture_logs
from transformers import AutoModelForSequenceClassification, dynamic_module_utils

from reranker_service import check, loading
from reranker_service.engines.vllm_arguments import check_supported
from reranker_service.models import UnsupportedModelError, fingerprint, read_model
from reranker_service.models.hub import weights_of
from reranker_service.settings import Settings

from . import families, models
from .test_families import PAIRS, assert_equal, library_scores, pair_layout, score
from .test_model import edit


def write_adapter(model: Path, directory: Path, **more: Any) -> Path:
    """A LoRA adapter with random weights for a sequence classifier."""
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value", "q_proj"], **more))
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)  # more would amplify the rounding of weights that are merged
    adapted.save_pretrained(directory)
    return directory


def adapted_scores(model: Path, adapter: Path) -> Any:
    from peft import PeftModel

    encoder: Any = CrossEncoder(str(model), device="cpu")
    encoder[0].model = PeftModel.from_pretrained(encoder[0].model, str(adapter)).eval()
    return encoder.predict(PAIRS, activation_fn=torch.nn.Identity())


@pytest.mark.parametrize("family", ["bert", "bert with a new head", "qwen2"])
def test_an_adapter_is_merged_into_the_weights(family: str, tmp_path: Path) -> None:
    if family == "qwen2":
        model = families.build_classifier(tmp_path / "model", "qwen2")
    else:
        model = models.build_bert_cross_encoder(tmp_path / "model")
    more = {"modules_to_save": ["classifier"]} if "head" in family else {}
    adapter = write_adapter(model, tmp_path / "adapter", **more)
    plain, spec = read_model(str(model)), read_model(str(model), adapter=adapter)
    found = score(spec, pair_layout(spec), PAIRS)
    assert_equal(found, adapted_scores(model, adapter))
    assert np.abs(found - library_scores(model, PAIRS)).max() > 0.01
    assert fingerprint(spec, {}) != fingerprint(plain, {})
    with pytest.raises(UnsupportedModelError, match="adapter is merged by the torch engine only"):
        check_supported(spec)


def test_adapters_that_cannot_be_merged_are_refused(
    cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no adapter_config\.json; give a directory that PEFT saved"):
        read_model(str(cross_encoder), adapter=tmp_path)
    adapter = write_adapter(cross_encoder, tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match="is a PEFT adapter; serve its base model, with this directory"):
        read_model(str(adapter))
    other = families.build_classifier(tmp_path / "other", "gpt2")
    spec = read_model(str(other), adapter=adapter)
    with pytest.raises(UnsupportedModelError, match="--adapter adapter does not fit other"):
        score(spec, pair_layout(spec), PAIRS)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    spec = read_model(str(cross_encoder), adapter=adapter)
    with pytest.raises(UnsupportedModelError, match="merged by peft, which is not installed; pip install peft"):
        score(spec, pair_layout(spec), PAIRS)


CODE = """
from transformers import BertConfig, BertForSequenceClassification


class OwnConfig(BertConfig):
    model_type = "own"


class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        outputs = super().forward(*arguments, **options)
        outputs.logits = 2 * outputs.logits
        return outputs
"""


def test_code_of_a_model_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    model = models.build_bert_cross_encoder(tmp_path / "model")
    (model / "own.py").write_text(CODE)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    edit(model / "config.json", model_type="own", architectures=["OwnForSequenceClassification"], auto_map=names)
    with pytest.raises(UnsupportedModelError, match=r"^model: its config.json can't .* with --trust-remote-code$"):
        loading.choose_model(Settings(model=str(model)))
    with capture_logs() as events:
        spec = loading.choose_model(Settings(model=str(model), trust_remote_code=True))
    assert [event["log_level"] for event in events if "Python code" in event["event"]] == ["warning"]
    reference = CrossEncoder(str(model), device="cpu", trust_remote_code=True)
    wanted = reference.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert_equal(score(spec, pair_layout(spec), PAIRS), wanted)
    before = fingerprint(spec, {})
    (model / "own.py").write_text(CODE.replace("2 *", "3 *"))
    assert fingerprint(spec, {}) != before


MODULES = """
from sentence_transformers.base.modules import Module
from torch import nn


class Twice(Module):
    config_keys = ["width"]

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, 1)

    def forward(self, features, **options):
        features["scores"] = 2 * self.linear(features["sentence_embedding"])
        return features

    def save(self, path, *arguments, safe_serialization=True, **options):
        self.save_config(path)
        self.save_torch_weights(path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, path, subfolder="", **options):
        places = {"subfolder": subfolder, "local_files_only": True}
        return cls.load_torch_weights(path, model=cls(**cls.load_config(path, **places)), **places)
"""


def test_modules_of_a_models_own_code_run_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(check, "_be_quiet", lambda: None)
    for path in (tmp_path / "cache", tmp_path / "code"):
        monkeypatch.syspath_prepend(path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_modules.py").write_text(MODULES)
    twice = importlib.import_module("own_modules").Twice(models.HIDDEN)
    plain = models.build_bi_encoder(tmp_path / "plain")
    edit(plain / "config.json", id2label=None, label2id=None)  # two labels by default, for which predict gives a column
    base = SentenceTransformer(str(plain), device="cpu")
    model = tmp_path / "model"
    CrossEncoder(modules=[base[0], base[1], twice], device="cpu").save_pretrained(str(model))
    (model / "own_modules.py").write_text(MODULES)
    with pytest.raises(UnsupportedModelError, match=r"names own_modules\.Twice, which is Python code"):
        read_model(str(model))
    spec = read_model(str(model), trust_remote_code=True)
    assert spec.library_model
    wanted = CrossEncoder(str(model), device="cpu", trust_remote_code=True).predict(
        PAIRS, activation_fn=torch.nn.Identity()
    )
    assert wanted.shape == (len(PAIRS), 1)
    assert_equal(score(spec, pair_layout(spec), PAIRS), wanted[:, 0])
    check.main([str(model), "--engine", "torch", "--trust-remote-code"])
    assert "FAULT: torch float32 differs" not in capsys.readouterr().out
    with pytest.raises(UnsupportedModelError, match="sentence-transformers runs this model as a whole, which vLLM doe"):
        check_supported(spec)
    # The name of a module of the library does not make a class one of the library's.
    text = (model / "modules.json").read_text()
    (model / "modules.json").write_text(text.replace(json.loads(text)[0]["type"], "own_modules.Transformer"))
    with pytest.raises(UnsupportedModelError, match=r"begins with own_modules\.Transformer; the first modu"):
        read_model(str(model), trust_remote_code=True)


class Hub:
    """A hub with one repository, which is a directory."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.fetched: list[tuple[str | None, list[str]]] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.names)

    def download(self, model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.fetched.append((revision, allow_patterns))
        return str(self.directory)

    def names(self, model: str, *, revision: str | None) -> list[str]:
        return [str(path.relative_to(self.directory)) for path in self.directory.rglob("*")]


def test_code_in_another_repository_is_fetched_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    hub = Hub(model, monkeypatch)
    names = {"AutoConfig": "owner/code--own.Config", "AutoTokenizer": [None, "owner/code--own.Tokenizer"]}
    edit(model / "config.json", auto_map=names)
    read_model(str(model))
    assert not hub.fetched
    with pytest.raises(UnsupportedModelError, match=r"config\.json can't be used"):  # the cache lacks it
        read_model(str(model), trust_remote_code=True)
    assert hub.fetched == [(None, ["*.py"])]


def test_a_model_is_judged_before_its_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build_causal(tmp_path, "qwen3")
    (model / "pytorch_model.bin").touch()
    hub = Hub(model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="generates text"):
        read_model("owner/chat", revision="v2")
    assert hub.fetched == [("v2", ["*.json", "*.txt", "*.model", "*.jinja"])]
    spec = read_model("Qwen/Qwen3-Reranker-0.6B", revision="v2")
    assert (spec.name, spec.family) == ("Qwen/Qwen3-Reranker-0.6B", "qwen3-reranker")
    assert hub.fetched[2:] == [("v2", ["model.safetensors"])]
    with pytest.raises(UnsupportedModelError, match="--revision v2 is for a model on the hub"):
        read_model(str(model), revision="v2")


def test_each_folder_has_its_weights_once() -> None:
    names = ["config.json", "model-1.safetensors", "model-2.safetensors", "pytorch_model.bin", "training_args.bin"]
    names += ["2_Dense/pytorch_model.bin", "3_Dense/model.safetensors", "3_Dense/pytorch_model.bin"]
    names += ["onnx/model.safetensors", "original/consolidated.safetensors"]
    wanted = ["2_Dense/pytorch_model.bin", "3_Dense/model.safetensors", "model-1.safetensors", "model-2.safetensors"]
    assert weights_of(names) == wanted


def test_prompts_can_be_replaced(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path / "bi", prompts={"query": "q: ", "document": "d: "})
    spec = loading.choose_model(Settings(model=str(model), prompts={"query": "search: "}))
    assert (spec.query_prompt, spec.document_prompt) == ("search: ", "d: ")
    assert dict(spec.saved.prompts) == {"query": "search: ", "document": "d: "}
    model = models.build_bert_cross_encoder(tmp_path / "cross")
    spec = read_model(str(model), prompts={"query": "search: "})
    wanted = library_scores(model, PAIRS, prompt="search: ")
    assert_equal(score(spec, pair_layout(spec), PAIRS), wanted)
    assert spec.saved.default_prompt_name == "query"


def test_flags_of_a_model_need_one() -> None:
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code is for the model of --model; give both"):
        loading.choose_model(Settings(trust_remote_code=True))


def run_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(check, "_be_quiet", lambda: None)  # it changes settings of this whole process
    check.main([*arguments, "--engine", "torch"])
    return capsys.readouterr().out


def test_check_of_families(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logit_score = families.build_logit_score(tmp_path / "logit-score")
    report = run_check(capsys, monkeypatch, str(logit_score))
    assert "score from  the logit of 'yes' minus that of 'no'" in report
    assert "template    chat-template" in report
    assert "differs from sentence-transformers in float32 by" in report
    assert "differs from sentence-transformers by" not in report
    assert "inputs      joined from tokens; proved equal to the library's" in report
    trimmed = families.build_logit_score(tmp_path / "trimmed", template=families.TRIMMED_TEMPLATE)
    report = run_check(capsys, monkeypatch, str(trimmed))
    assert "inputs      by sentence-transformers, one by one" in report
    assert "differs from sentence-transformers in float32 by" in report
    assert "differs from sentence-transformers by" not in report
    classifier = families.build_classifier(tmp_path / "classifier", "llama")
    adapter = write_adapter(classifier, tmp_path / "adapter")
    report = run_check(capsys, monkeypatch, str(classifier), "--adapter", str(adapter))
    assert "score from  Transformer: the whole model is run by sentence-transformers" in report
    assert f"adapter     {adapter}, merged" in report
    assert "differs from sentence-transformers by" not in report
    bare = families.build_causal(tmp_path / "bare", "gemma", max_position_embeddings=1024)
    report = run_check(capsys, monkeypatch, str(bare), "--family", "bge-reranker-v2-gemma")
    assert "family      bge-reranker-v2-gemma: template and answers come from the registry" in report
    assert "score from  the logit of 'Yes'" in report
    assert "not compared" in report
