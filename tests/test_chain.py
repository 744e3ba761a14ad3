"""CrossEncoders whose score comes from a chain of sentence-transformers modules, such as Ettin's rerankers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from torch import nn
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel

from reranker_service import loading
from reranker_service.engines.torch_engine import TorchEngine
from reranker_service.engines.vllm_arguments import check_supported
from reranker_service.models import ModelSpec, UnsupportedModelError, fingerprint, make_layout, read_model
from reranker_service.settings import Settings
from tests import references
from tests.models import all_minilm

HIDDEN = 32


def build(directory: Path, pooling: str = "cls", scores: int = 1) -> Path:
    """Write a CrossEncoder in the layout of Ettin's rerankers, with random weights."""
    torch.manual_seed(0)
    plain = directory / "plain"
    tokenizer = AutoTokenizer.from_pretrained(all_minilm(), model_max_length=128)
    tokenizer.save_pretrained(plain)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        local_attention=16,
        global_attn_every_n_layers=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    ModernBertModel(config).save_pretrained(plain)
    modules = [
        Transformer(str(plain), transformer_task="feature-extraction"),
        Pooling(HIDDEN, pooling_mode=pooling),
        Dense(HIDDEN, HIDDEN, bias=False, activation_function=nn.GELU()),
        LayerNorm(HIDDEN),
        Dense(HIDDEN, scores, activation_function=nn.Identity(), module_output_name="scores"),
    ]
    CrossEncoder(modules=modules).save_pretrained(str(directory / "saved"))
    return directory / "saved"


def score(spec: ModelSpec, pairs: list[tuple[str, str]], **options: Any) -> NDArray[np.float32]:
    layout: Any = make_layout(spec)
    queries = layout.encode_queries([query for query, _ in pairs], None)
    documents = layout.encode_documents([document for _, document in pairs])
    inputs = layout.join(queries, documents, spec.default_length)

    async def work() -> NDArray[np.float32]:
        engine = TorchEngine(spec, **options)
        await engine.start()
        assert engine.choices()["packed"] is options.get("packed", False)
        try:
            return await engine.run(inputs)
        finally:
            await engine.close()

    return asyncio.run(work())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_chain_gives_the_scores_of_the_library(pooling: str, tmp_path: Path) -> None:
    model = build(tmp_path, pooling)
    pairs = [*references.pairs(), ("a query", "a document that is far too long " * 40)]
    wanted = CrossEncoder(str(model)).predict(pairs, activation_fn=nn.Identity())
    assert np.ptp(wanted) > 0.1
    spec = read_model(str(model))
    assert (spec.kind, spec.max_length, spec.default_length) == ("cross-encoder", 128, 128)
    assert [name for name, _ in spec.chain] == ["Pooling", "Dense", "LayerNorm", "Dense"]
    np.testing.assert_allclose(score(spec, pairs), wanted, atol=1e-5)
    np.testing.assert_allclose(score(spec, pairs, packed=True), wanted, atol=1e-5)


def test_a_change_of_a_module_changes_the_fingerprint(tmp_path: Path) -> None:
    model = build(tmp_path)
    before = fingerprint(read_model(str(model)), {})
    shutil.copytree(model, tmp_path / "same")
    assert fingerprint(read_model(str(tmp_path / "same")), {}) == before
    last = sorted(model.glob("*_Dense"))[-1] / "model.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert fingerprint(read_model(str(model)), {}) != before


def test_vllm_refuses_a_chain_and_auto_chooses_torch(tmp_path: Path) -> None:
    model = build(tmp_path)
    with pytest.raises(UnsupportedModelError, match="vLLM has no chain of Pooling, Dense, LayerNorm, Dense; use the"):
        check_supported(read_model(str(model)))
    assert loading.load(Settings(model=str(model))).engine.name == "torch"


def test_chains_that_make_no_single_score_are_refused(tmp_path: Path) -> None:
    message = r'a chain that makes a score has a Pooling, and a Dense with module_output_name "scores" and one'
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(str(build(tmp_path / "three", scores=3)))
    model = build(tmp_path / "none")
    last = sorted(model.glob("*_Dense"))[-1] / "config.json"
    last.write_text(json.dumps({**json.loads(last.read_text()), "module_output_name": "sentence_embedding"}))
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(str(model))


def test_a_chain_whose_pooling_leaves_out_the_prompt_is_refused(tmp_path: Path) -> None:
    model = build(tmp_path)
    pooling = model / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    read_model(str(model))  # without a prompt there is nothing to leave out
    with pytest.raises(
        UnsupportedModelError, match=r"leaves out the prompt \(include_prompt = false\) is not supported"
    ):
        read_model(str(model), prompts={"query": "query: "})


def test_a_module_without_weights_is_refused(tmp_path: Path) -> None:
    model = build(tmp_path)
    (sorted(model.glob("*_Dense"))[-1] / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="a module of its chain cannot be loaded"):
        score(read_model(str(model)), [("a", "b")])
