"""Packed batches: the same numbers as each sequence alone, for all architectures that can be packed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from reranker_service.engines.packed import KERNEL_DTYPES, Packed, kernel_available, pack_backbone, pack_classifier
from reranker_service.engines.torch_engine import TorchEngine, _batch_tokens
from reranker_service.models import ModelSpec, TokenSequence, make_layout, read_model
from tests import references

LENGTHS = (5, 1, 200, 33, 64)
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 300,
    "num_labels": 1,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "electra": {"embedding_size": 32},
    "modernbert": {"local_attention": 32, "global_attn_every_n_layers": 2, "classifier_pooling": "cls"},
    "modernbert-mean": {"local_attention": 32, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"},
}


def classifier(name: str) -> Any:
    torch.manual_seed(1)
    config: Any = transformers.AutoConfig.for_model(name.removesuffix("-mean"), **{**SMALL, **CLASSIFIERS[name]})
    auto: Any = transformers.AutoModelForSequenceClassification
    return auto.from_config(config).eval().requires_grad_(False)


def sequences(seed: int, two_segments: bool) -> list[TokenSequence]:
    generator = np.random.default_rng(seed)
    return [
        TokenSequence(generator.integers(4, 99, size=length).astype(np.int32), length // 2 if two_segments else length)
        for length in LENGTHS
    ]


def alone(model: Any, sequence: TokenSequence) -> Any:
    inputs = {"input_ids": torch.from_numpy(sequence.ids.astype(np.int64))[None]}
    if sequence.first_segment < len(sequence.ids):
        inputs["token_type_ids"] = (torch.arange(len(sequence.ids)) >= sequence.first_segment).long()[None]
    return model(**inputs)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_packed_classifiers_give_the_logits_of_each_sequence_alone(name: str) -> None:
    model = classifier(name)
    batch = sequences(0, two_segments=name in ("bert", "electra"))
    wanted = [alone(model, sequence).logits[0, 0].item() for sequence in batch]
    assert np.ptp(wanted) > 1e-3, "the test's model must tell sequences apart"
    packed = pack_classifier(model)
    assert packed is not None
    found = packed(Packed.of(batch, torch.device("cpu")))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_classifier_that_cannot_be_packed_is_left_as_it_was() -> None:
    config = transformers.AutoConfig.for_model("deberta-v2", **SMALL, relative_attention=True, pos_att_type=["p2c"])
    model: Any = transformers.DebertaV2ForSequenceClassification(config).eval()
    before = alone(model, sequences(0, False)[3]).logits
    assert pack_classifier(model) is None
    assert torch.equal(alone(model, sequences(0, False)[3]).logits, before)


def test_packed_decoders_see_only_earlier_tokens_of_their_own_sequence() -> None:
    config = transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=16, use_cache=False)
    model: Any = transformers.Qwen3Model(config).eval().requires_grad_(False)
    batch = sequences(0, False)
    wanted = torch.cat([alone(model, sequence).last_hidden_state[0] for sequence in batch])
    packed = pack_backbone(model)
    assert packed is not None
    torch.testing.assert_close(packed(Packed.of(batch, torch.device("cpu"))), wanted, atol=1e-5, rtol=1e-5)


def run(spec: ModelSpec, batch: list[TokenSequence], **options: Any) -> tuple[NDArray[np.float32], dict[str, object]]:
    async def work() -> tuple[NDArray[np.float32], dict[str, object]]:
        engine = TorchEngine(spec, **options)
        await engine.start()
        try:
            return await engine.run(batch), engine.choices()
        finally:
            await engine.close()

    return asyncio.run(work())


def pair_inputs(spec: ModelSpec) -> list[TokenSequence]:
    layout: Any = make_layout(spec)
    pairs = references.pairs()
    queries = layout.encode_queries([query for query, _ in pairs], None)
    return layout.join(queries, layout.encode_documents([document for _, document in pairs]), spec.default_length)


def test_the_engine_gives_the_same_scores_packed_and_padded(cross_encoder: Path, causal_reranker: Path) -> None:
    for model in (cross_encoder, causal_reranker):
        spec = read_model(str(model))
        batch = pair_inputs(spec)
        padded, choices = run(spec, batch, packed=False)
        assert choices["packed"] is False
        packed, choices = run(spec, batch, packed=True)
        assert choices["packed"] is True
        np.testing.assert_allclose(packed, padded, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_the_engine_gives_the_same_embeddings_packed_and_padded(pooling: str, bi_encoder: Path) -> None:
    spec = replace(read_model(str(bi_encoder)), pooling=pooling)  # type: ignore[arg-type]
    layout: Any = make_layout(spec)
    texts = [text for pair in references.pairs() for text in pair]
    batch = [layout.single(text, spec.default_length)[0] for text in layout.encode_documents(texts)]
    padded, _ = run(spec, batch, packed=False)
    packed, choices = run(spec, batch, packed=True)
    assert choices["packed"] is True
    np.testing.assert_allclose(packed, padded, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_kernel_agrees_with_the_mask(name: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    if not kernel_available(device, dtype):
        pytest.skip("this torch or this GPU has no attention of variable length")
    model = classifier(name)
    batch = sequences(0, two_segments=name in ("bert", "electra"))
    exact = torch.tensor([alone(model, sequence).logits[0, 0].item() for sequence in batch])
    packed = pack_classifier(model.to(device, dtype))
    assert packed is not None
    found = packed(Packed.of(batch, device)).cpu()
    assert (found - exact).abs().max() < 0.02 * exact.abs().max().clamp(min=1)


def test_compiled_layers_give_the_same_scores(cross_encoder: Path) -> None:
    spec = read_model(str(cross_encoder))
    batch = pair_inputs(spec)
    plain, choices = run(spec, batch, packed=True)
    assert choices["compiled"] is False
    compiled, choices = run(spec, batch, packed=True, compiled=True)
    assert choices["compiled"] is True
    np.testing.assert_allclose(compiled, plain, atol=1e-5)


def test_without_a_compiler_the_engine_goes_on_without_compiling(
    cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import codecache

    def compiler_is_missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no C++ compiler")

    spec = read_model(str(cross_encoder))
    batch = pair_inputs(spec)
    plain, _ = run(spec, batch, packed=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    monkeypatch.setattr(codecache.CppCodeCache, "load_async", compiler_is_missing)
    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "load_async", compiler_is_missing)
    try:
        torch.compiler.reset()
        found, choices = run(spec, batch, packed=True, compiled=True)
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
    assert choices["compiled"] is False
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_a_gpus_batches_are_smaller_for_larger_models() -> None:
    def tokens(weights: int) -> int:
        return _batch_tokens(torch.nn.Linear(weights, 1, bias=False, device="meta"))

    # 2e13 operations a batch, two a weight and token.
    assert tokens(100_000_000) == 100_000
    assert tokens(10_000_000) == 131_072
    assert tokens(4_000_000_000) == 8_192
