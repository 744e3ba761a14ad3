"""The example programs, over real sockets and in real processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from examples import ettin_reranker, mine_and_train, qwen3_reranker, train_lora
from examples.student import load_student

from . import forked, test_chain
from .servers import ServerProcess


def differs(trained: SentenceTransformer) -> bool:
    """Whether a model embeds a text otherwise than the untrained student."""
    return not torch.equal(*(model.encode("a file", convert_to_tensor=True) for model in (trained, load_student())))


def test_training_on_two_ranks(bi_encoder_server: ServerProcess, tmp_path: Path) -> None:
    # As torchrun does it, except that no interpreter is started for the launcher and for each rank.
    program = f"""
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from examples.train_distributed import main
here = dict(rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id="test")
ranks = elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **here), main)
ranks(["{bi_encoder_server.address}", "--tiny", "--output", "trained"])
"""
    done = forked.run([sys.executable, "-c", program], cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "train_loss" in done.stdout
    assert (tmp_path / "trained" / "model.safetensors").exists()


@pytest.mark.usefixtures("forked_children")
def test_a_qwen3_reranker_is_served_ranks_documents_and_guides(
    causal_reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--engine", "torch", "--tiny", "--output", str(tmp_path / "trained")]
    assert qwen3_reranker.main([str(causal_reranker), *flags]) == 0
    assert differs(SentenceTransformer(str(tmp_path / "trained"), device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    ranked = [line.split()[0] for line in lines if line.startswith("  ")]
    assert len(ranked) == 6
    scores = [float(score) for score in ranked]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert any(line.startswith("Instruction: Given the summary") for line in lines)


@pytest.mark.usefixtures("forked_children")
def test_a_server_that_does_not_start_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qwen3_reranker.main([str(tmp_path / "nothing")]) == 1
    assert "ended before it was ready" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_children")
def test_an_ettin_reranker_guides(tmp_path: Path) -> None:
    model = test_chain.build(tmp_path / "ettin")
    flags = ["--device", "cpu", "--max-length", "64", "--tiny", "--output", str(tmp_path / "trained")]
    assert ettin_reranker.main([str(model), *flags]) == 0
    assert differs(SentenceTransformer(str(tmp_path / "trained"), device="cpu"))


def test_negatives_are_mined_and_trained_on(bi_encoder_server: ServerProcess, tmp_path: Path) -> None:
    mine_and_train.main([bi_encoder_server.address, "--tiny", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert set(row) == {"anchor", "positive", "negative_1", "negative_2"}
        assert row["positive"] not in (row["negative_1"], row["negative_2"])
    assert differs(SentenceTransformer(str(tmp_path / "model"), device="cpu"))


def test_only_the_adapter_is_trained_and_saved(
    bi_encoder_server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_student()
    monkeypatch.setattr(train_lora, "load_student", lambda: trained)
    train_lora.main([bi_encoder_server.address, "--tiny", "--output", str(tmp_path)])
    assert differs(trained)
    before = load_student()
    after = dict(trained.named_parameters())
    for name, weights in before.named_parameters():
        wrapped = name.replace("query.", "query.base_layer.").replace("value.", "value.base_layer.")
        assert torch.equal(weights, after[wrapped]), name
    assert (tmp_path / "adapter_model.safetensors").exists()
    before.load_adapter(str(tmp_path))
    texts = ["a file", "a date"]
    assert torch.allclose(*(one.eval().encode(texts, convert_to_tensor=True) for one in (before, trained)), atol=1e-6)
