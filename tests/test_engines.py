"""The torch engine computes the numbers of transformers and sentence-transformers; vLLM refuses what it lacks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reranker_service.engines import Engine, EngineDeadError, EngineMemoryError, NonFiniteScoreError
from reranker_service.engines.torch_engine import TorchEngine
from reranker_service.engines.vllm_engine import VllmEngine
from reranker_service.models import (
    ModelSpec,
    PairLayout,
    TextLayout,
    TokenSequence,
    UnsupportedModelError,
    make_layout,
    read_model,
)

from . import models, references
from .computing import compute

TOLERANCE = 1e-5


def inputs(
    spec: ModelSpec, texts: Sequence[tuple[str, str]], max_length: int | None = None, instruction: str | None = None
) -> list[TokenSequence]:
    layout = make_layout(spec)
    assert isinstance(layout, PairLayout)
    queries = layout.encode_queries([query for query, _ in texts], instruction)
    documents = layout.encode_documents([document for _, document in texts])
    return layout.join(queries, documents, max_length or spec.default_length)


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize(
    "build",
    [models.build_bert_cross_encoder, models.build_xlm_roberta_cross_encoder, models.build_roberta_cross_encoder],
)
def test_cross_encoders(build: Callable[[Path], Path], max_length: int | None, tmp_path: Path) -> None:
    model, texts = build(tmp_path), references.pairs()
    spec = read_model(str(model))
    scores = compute(spec, inputs(spec, texts, max_length))
    expected = references.cross_encoder_logits(model, texts, max_length)
    assert scores.dtype == np.float32
    assert expected.std() > 0.1
    assert np.abs(scores - expected).max() < TOLERANCE


@pytest.mark.parametrize("model_type", models.OTHER_ENCODERS)
def test_other_cross_encoders(model_type: str, tmp_path: Path) -> None:
    model, texts = models.build_other_cross_encoder(tmp_path, model_type), references.pairs()
    spec = read_model(str(model))
    assert (spec.kind, spec.default_length) == ("cross-encoder", 128)
    expected = references.cross_encoder_logits(model, texts, 128)
    assert expected.std() > 0.1
    assert np.abs(compute(spec, inputs(spec, texts)) - expected).max() < TOLERANCE


@pytest.mark.parametrize("instruction", [None, "", "Find the body that belongs to the summary."])
@pytest.mark.parametrize("max_length", [1024, 260])
def test_causal_rerankers(instruction: str | None, max_length: int, tmp_path: Path) -> None:
    original = models.build_qwen3_reranker(tmp_path / "original")
    converted = models.build_qwen3_reranker_converted(tmp_path / "converted")
    texts = references.short_queries()
    expected = references.causal_logits(original, texts, instruction, max_length)
    assert expected.std() > 0.1
    for model in (original, converted):
        spec = read_model(str(model))
        scores = compute(spec, inputs(spec, texts, max_length, instruction))
        assert np.abs(scores - expected).max() < TOLERANCE


@pytest.mark.parametrize("max_length", [None, 16])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_bi_encoders(pooling: str, max_length: int | None, tmp_path: Path) -> None:
    prompts = {"query": "query: ", "document": "text: "}
    model = models.build_bi_encoder(tmp_path, pooling=pooling, prompts=prompts, normalize=pooling != "max")
    check_bi_encoder(model, max_length)


def test_the_real_bi_encoder() -> None:
    check_bi_encoder(models.all_minilm(), None)


def check_bi_encoder(model: Path, max_length: int | None) -> None:
    spec, texts = read_model(str(model)), references.pairs()
    layout = make_layout(spec)
    assert isinstance(layout, TextLayout)
    queries, documents = [query for query, _ in texts], [document for _, document in texts]
    encoded = [*layout.encode_queries(queries, None), *layout.encode_documents(documents)]
    vectors = compute(spec, [layout.single(one, max_length or spec.default_length)[0] for one in encoded])
    expected = np.concatenate(
        [
            references.embeddings(model, queries, "query", max_length),
            references.embeddings(model, documents, "document", max_length),
        ]
    )
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert (expected @ expected.T).std() > 0.05
    assert np.abs(vectors @ vectors.T - expected @ expected.T).max() < TOLERANCE


def test_leading_dimensions(tmp_path: Path) -> None:
    spec = read_model(str(models.build_bi_encoder(tmp_path)))
    layout = make_layout(spec)
    assert isinstance(layout, TextLayout)
    sequences = [layout.single(one, 64)[0] for one in layout.encode_documents(["some text", "more"])]
    whole, part = compute(spec, sequences), compute(replace(spec, dimensions=8), sequences)
    assert part.shape == (2, 8)
    assert np.allclose(part, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)


def test_batches_do_not_change_scores(cross_encoder: Path, causal_reranker: Path) -> None:
    for model in (cross_encoder, causal_reranker):
        spec = read_model(str(model))
        sequences = inputs(spec, references.pairs())
        whole = compute(spec, sequences)
        # A sequence in a batch of its own is not padded.
        alone = np.concatenate([compute(spec, [sequence]) for sequence in sequences[-9:]])
        assert np.abs(alone - whole[-9:]).max() < TOLERANCE
        assert np.abs(compute(spec, sequences[::-1])[::-1] - whole).max() < TOLERANCE


def test_no_sequences_give_no_scores(cross_encoder: Path) -> None:
    assert compute(read_model(str(cross_encoder)), []).shape == (0,)


def test_a_batch_that_is_cancelled_before_it_begins_never_runs(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_model(str(cross_encoder))
    began, go_on = threading.Event(), threading.Event()
    batches: list[int] = []
    compute_batch = TorchEngine._compute

    def slow(self: TorchEngine, sequences: list[TokenSequence]):
        batches.append(len(sequences))
        began.set()
        assert go_on.wait(60)
        return compute_batch(self, sequences)

    monkeypatch.setattr(TorchEngine, "_compute", slow)

    async def work() -> None:
        engine = TorchEngine(spec, threads=1)
        await engine.start()
        sequences = inputs(spec, references.pairs())
        runs = [asyncio.create_task(engine.run(sequences[:count])) for count in (1, 2, 3, 4)]
        await asyncio.to_thread(began.wait, 60)
        runs[0].cancel()  # its batch is running
        runs[2].cancel()
        go_on.set()
        found = await asyncio.gather(*runs, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert isinstance(found[2], asyncio.CancelledError)
        assert (len(found[1]), len(found[3])) == (2, 4)
        await engine.close()

    asyncio.run(work())
    assert batches == [1, 2, 4]


def test_a_dead_device_is_reported_even_if_the_batch_that_found_it_was_cancelled(cross_encoder: Path) -> None:
    async def work() -> None:
        spec = read_model(str(cross_encoder))
        engine = TorchEngine(spec)
        await engine.start()
        engine._death = EngineDeadError("the device failed")
        with pytest.raises(EngineDeadError, match="the device failed"):
            await engine.run(inputs(spec, [("a", "b")]))
        assert str(await asyncio.wait_for(engine.wait_dead(), 30)) == "the device failed"
        await engine.close()

    asyncio.run(work())


def test_scores_that_are_not_finite_are_reported(cross_encoder: Path, tmp_path: Path) -> None:
    spec = replace(read_model(str(copy(cross_encoder, tmp_path))), name="broken")
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"][:] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteScoreError, match="broken gave 2 of 2 results that are not finite"):
        compute(spec, inputs(spec, [("a", "b"), ("c", "d")]))


def test_weights_that_lack_the_head_are_refused(cross_encoder: Path, tmp_path: Path) -> None:
    spec = read_model(str(copy(cross_encoder, tmp_path)))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"do not fit its configuration: .*classifier\.weight missing"):
        compute(spec, [])


class Attack:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.path, "code of the checkpoint ran"))


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_carry_code_are_refused_and_the_code_never_runs(
    zipped: bool, cross_encoder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    spec = read_model(str(copy(cross_encoder, model)))
    weights: dict[str, object] = dict(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert np.isfinite(compute(spec, inputs(spec, [("a", "b")]))).all()
    weights["attack"] = Attack(tmp_path / "proof")
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin hold Python objects other than tensors"):
        compute(spec, [])
    assert not (tmp_path / "proof").exists()


def copy(model: Path, target: Path) -> Path:
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_number_formats(cross_encoder: Path) -> None:
    spec = read_model(str(cross_encoder))
    sequences = inputs(spec, references.pairs())
    exact = compute(spec, sequences)
    rough = compute(spec, sequences, dtype="bfloat16")
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.2
    with pytest.raises(ValueError, match="dtype 'float8' is unknown; known are auto, float32"):
        TorchEngine(spec, dtype="float8")
    with pytest.raises(ValueError, match="device 'abacus' is unknown"):
        TorchEngine(spec, device="abacus")


def test_a_device_that_fails_for_good_is_the_engines_death(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_model(str(cross_encoder))

    def fail(self: TorchEngine, sequences: list[TokenSequence]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    async def work() -> None:
        engine = TorchEngine(spec, threads=1)
        await engine.start()
        monkeypatch.setattr(TorchEngine, "_compute", fail)
        monkeypatch.setattr(engine, "_device", type("Device", (), {"type": "cuda"}))
        watch = asyncio.create_task(engine.wait_dead())
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="illegal memory access"):
                await engine.run(inputs(spec, [("a", "b")]))
        assert "illegal memory access" in str(await watch)
        await engine.close()

    asyncio.run(work())


def test_models_that_vllm_cannot_run_are_refused_before_it_starts(tmp_path: Path, cross_encoder: Path) -> None:
    spec = read_model(str(cross_encoder))
    with pytest.raises(UnsupportedModelError, match=r"vLLM has no BertForSequenceClassification.*torch engine"):
        VllmEngine(replace(spec, model_type="deberta-v2"))
    bi_encoder = read_model(str(models.build_bi_encoder(tmp_path, pooling="max")))
    with pytest.raises(UnsupportedModelError, match="no max pooling; use the torch engine"):
        VllmEngine(bi_encoder)


def test_both_engines_implement_the_protocol(cross_encoder: Path) -> None:
    spec = read_model(str(cross_encoder))
    engines: list[Engine] = [TorchEngine(spec), VllmEngine(spec)]
    assert [engine.name for engine in engines] == ["torch", "vllm"]
    assert engines[0].versions.keys() >= {"torch", "transformers"}


def out_of_memory_above(size: int, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Have the model's forward pass fail for batches of more than ``size`` tokens; gives the sizes of all batches."""
    sizes: list[int] = []
    load = TorchEngine._load

    def patched(self: TorchEngine) -> None:
        load(self)
        model = self._model
        assert model is not None
        forward = model.forward

        def limited(**inputs: torch.Tensor) -> object:
            sizes.append(inputs["input_ids"].numel())
            if sizes[-1] > size:
                raise error
            return forward(**inputs)

        monkeypatch.setattr(model, "forward", limited)

    monkeypatch.setattr(TorchEngine, "_load", patched)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "driver", "cpu", "numpy"],
)
def test_a_batch_that_is_out_of_memory_is_halved(
    cross_encoder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    spec = read_model(str(cross_encoder))
    sequences = inputs(spec, references.pairs()[:13])
    expected = compute(spec, sequences)
    sizes = out_of_memory_above(3 * 128, monkeypatch, error)
    assert np.abs(compute(spec, sequences) - expected).max() < TOLERANCE
    assert max(sizes) > 3 * 128


@pytest.mark.parametrize("kind", ["cross_encoder", "bi_encoder"])
def test_a_sequence_that_is_too_large_by_itself_fails_alone(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_model(str(request.getfixturevalue(kind)))
    layout = make_layout(spec)
    texts = ["short", "word " * 40, "another", "shorter"]
    if isinstance(layout, PairLayout):
        documents = layout.encode_documents(texts)
        sequences = layout.join(layout.encode_queries(["q"] * 4, None), documents, 128)
    else:
        sequences = [layout.single(one, 64)[0] for one in layout.encode_documents(texts)]
    expected = compute(spec, sequences)
    out_of_memory_above(40, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(EngineMemoryError, match=r"does not suffice for an input of \d+ tokens") as caught:
        compute(spec, sequences)
    found = caught.value.values
    assert found.shape == expected.shape
    assert np.isnan(found[1]).all()
    assert np.abs(np.delete(found, 1, axis=0) - np.delete(expected, 1, axis=0)).max() < TOLERANCE
    with pytest.raises(EngineMemoryError) as caught:
        compute(spec, [sequences[1]] * 3)
    assert len(caught.value.values) == 3
