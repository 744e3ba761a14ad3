"""The known answer that a model is asked at start, and the command that checks a model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from safetensors.torch import load_file, save_file

from reranker_service import check, loading
from reranker_service.models import UnsupportedModelError
from reranker_service.server import start_engine
from reranker_service.settings import Settings
from tests.test_chain import build as build_chain
from tests.test_engines import copy


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_be_quiet", lambda: None)  # it changes settings of this whole process


def with_weights(model: Path, target: Path, change: Any) -> Path:
    weights = load_file(copy(model, target) / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def lose_head(weights: dict[str, Any]) -> None:
    weights["classifier.weight"].zero_()


def turn_head(weights: dict[str, Any]) -> None:
    weights["classifier.weight"].neg_()


def start(model: Path) -> list[Any]:
    """Start the engine as the server does; gives the events that are logged."""

    async def work() -> None:
        loaded = loading.load(Settings(model=str(model), engine="torch"))
        try:
            await start_engine(loaded)
        finally:
            await loaded.engine.close()

    with structlog.testing.capture_logs() as events:
        asyncio.run(work())
    return events


def test_a_model_whose_head_was_lost_is_refused_at_start(cross_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="gives a relevant and an irrelevant document the same score"):
        start(with_weights(cross_encoder, tmp_path, lose_head))


def test_a_model_that_ranks_the_known_answer_wrong_is_an_error_in_the_log(cross_encoder: Path, tmp_path: Path) -> None:
    turned = with_weights(cross_encoder, tmp_path, turn_head)
    wrong = [
        [event for event in start(model) if event["event"].startswith("the model ranks an irrelevant document first")]
        for model in (cross_encoder, turned)
    ]
    # One of a model and its opposite is wrong.
    assert sorted(map(len, wrong)) == [0, 1]
    (event,) = wrong[0] + wrong[1]
    assert event["log_level"] == "error"
    assert event["relevant"] < event["irrelevant"]


def test_the_embedded_model_is_all_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--engine", "torch"]) == 0
    report = capsys.readouterr().out
    assert "model       all-MiniLM-L6-v2: bi-encoder, BertModel (bert)" in report
    assert "input       9 tokens: '[CLS] what is the capital of france? [SEP]'" in report
    assert "allowed are 0.0001" in report
    assert report.endswith("all right\n")


def test_a_chain_is_compared_with_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_chain(tmp_path)
    check.main([str(model), "--engine", "torch"])
    report = capsys.readouterr().out
    assert "score from  Pooling, Dense, LayerNorm, Dense, run by sentence-transformers" in report
    assert "differs from sentence-transformers in float32 by" in report
    assert "FAULT: torch float32 differs" not in report
    exact = check._library_scores
    monkeypatch.setattr(check, "_library_scores", lambda spec, say: exact(spec, say) + 0.001)
    assert check.main([str(model), "--engine", "torch"]) == 1
    assert "FAULT: torch float32 differs from sentence-transformers in float32 by 0.001" in capsys.readouterr().out


def test_a_lost_head_is_a_fault(cross_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(with_weights(cross_encoder, tmp_path, lose_head)), "--engine", "torch"]) == 1
    assert "FAULT: torch float32 gives a relevant and an irrelevant document the same score" in capsys.readouterr().out


def test_a_causal_reranker_is_shown_with_its_template(
    causal_reranker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check.main([str(causal_reranker), "--engine", "torch"])
    report = capsys.readouterr().out
    assert "score from  the logit of 'yes' minus that of 'no'" in report
    assert "<Instruct>: Given a web search query, retrieve relevant passages" in report
    assert "not compared" in report


def test_engines_are_compared_with_each_other_where_the_library_gives_no_scores(
    causal_reranker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loading.make_engine
    engines: list[Any] = []

    def second_is_off(settings: Settings, spec: Any) -> Any:
        engine: Any = made(settings, spec)
        engines.append(engine)
        if len(engines) == 2:
            right = engine.run

            async def run(*arguments: Any, **options: Any) -> Any:
                return await right(*arguments, **options) + 0.01

            engine.name, engine.run = "other", run
        return engine

    monkeypatch.setattr(check, "make_engine", second_is_off)
    assert check.main([str(causal_reranker), "--engine", "torch", "torch"]) == 1
    report = capsys.readouterr().out
    assert "FAULT: other float32 differs from torch float32 by 0.01" in report


def test_a_model_that_is_refused_is_a_failure_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reranker_service", "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("refused: ")
    assert "holds no config.json" in done.stderr
