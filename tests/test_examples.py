"""Tests of the example programs, started as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .servers import ServerProcess

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, seconds: float = 240) -> str:
    """Run a command to its end and return its output; on a timeout, kill all processes that it started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, printed
    return printed


def test_training_on_two_ranks(bi_encoder_server: ServerProcess, tmp_path: Path) -> None:
    program = (
        "from examples.train_distributed import train;"
        f"train(['{bi_encoder_server.address}'], 'trained', steps=2, batch_size=4)"
    )
    (tmp_path / "program.py").write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run(*launcher, "program.py", cwd=tmp_path)
    assert "train_loss" in printed
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_a_qwen3_reranker_is_served_and_ranks_documents(causal_reranker: Path, tmp_path: Path) -> None:
    printed = run(
        sys.executable, "-m", "examples.qwen3_reranker", str(causal_reranker), "--engine", "torch", cwd=tmp_path
    )
    lines = printed.splitlines()
    ranked = [line.split()[0] for line in lines if line.startswith("  ")]
    assert len(ranked) == 6
    scores = [float(score) for score in ranked]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert any(line.startswith("Instruction: Given the summary") for line in lines)


def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.qwen3_reranker", str(tmp_path / "nothing")]
    with pytest.raises(AssertionError, match="ended before it was ready"):
        run(*command, cwd=tmp_path)
