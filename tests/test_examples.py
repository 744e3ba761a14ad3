"""The example programs, over real sockets and in real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples import qwen3_reranker

from . import forked
from .servers import ServerProcess


def test_training_on_two_ranks(bi_encoder_server: ServerProcess, tmp_path: Path) -> None:
    # As torchrun does it, except that no interpreter is started for the launcher and for each rank.
    program = f"""
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from examples.train_distributed import train
here = dict(rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id="test")
ranks = elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **here), train)
ranks(["{bi_encoder_server.address}"], "trained", 2, 4, 64)
"""
    done = forked.run([sys.executable, "-c", program], cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "train_loss" in done.stdout
    assert (tmp_path / "trained" / "model.safetensors").exists()


@pytest.mark.usefixtures("forked_children")
def test_a_qwen3_reranker_is_served_and_ranks_documents(
    causal_reranker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qwen3_reranker.main([str(causal_reranker), "--engine", "torch"]) == 0
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
