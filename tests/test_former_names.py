"""Names of earlier releases: each goes on working, and a warning has the present name."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from loss_client import RemoteCrossEncoder, RerankerCachedGISTEmbedLoss, RerankerClient, ServerState
from loss_client.__main__ import main as loss_client
from loss_client.client.scores import ScoreMatrix, ScoreUsage
from loss_client.filter.statistics import LossStatistics

from . import forked
from .training import MemoryScorer, random_scores, student


def renamed(former: str, present: str) -> Any:
    return pytest.warns(DeprecationWarning, match=f"^{former} is now named {present}.$")


def test_arguments_of_the_client() -> None:
    with renamed("target", "address"), renamed("remembered_pairs", "cache_pairs"):
        client = RerankerClient(target="127.0.0.1:1", remembered_pairs=7)
    assert [state.address for state in client.servers] == ["127.0.0.1:1"]
    assert client.__reduce__()[1][-1] == 7
    with renamed("target", "address"):
        RemoteCrossEncoder(target="127.0.0.1:1").close()
    with pytest.raises(TypeError, match="address is given twice, also under its former name target"):
        RerankerClient(address="127.0.0.1:1", target="127.0.0.1:1")


def test_arguments_and_attributes_of_the_loss(tmp_path: Path) -> None:
    scorer = MemoryScorer(random_scores())
    with renamed("max_length", "reranker_max_length"):
        loss = RerankerCachedGISTEmbedLoss(student(tmp_path), scorer, max_length=99)
    assert loss.reranker_max_length == 99
    with renamed("max_length", "reranker_max_length"):
        loss.max_length = 98
    with renamed("max_length", "reranker_max_length"):
        assert loss.max_length == loss.reranker_max_length == 98


def test_the_former_mode_mass(tmp_path: Path) -> None:
    model, scorer = student(tmp_path), MemoryScorer(random_scores())
    given: list[tuple[dict[str, Any], float]] = [({}, 0.999), ({"epsilon": 0.25}, 0.75), ({"epsilon": None}, 0.999)]
    for options, top_p in given:
        message = f"candidates='mass' is now candidates='nearest' with top_p={top_p}"
        with pytest.warns(DeprecationWarning, match=message) as warned:
            loss = RerankerCachedGISTEmbedLoss(model, scorer, candidates="mass", **options)
        assert (loss.candidates, loss.top_p) == ("nearest", top_p)
        assert warned[-1].filename == __file__
    with pytest.warns(DeprecationWarning, match="epsilon is now 1 - top_p: write top_p=0.75"):
        loss = RerankerCachedGISTEmbedLoss(model, scorer, candidates="nearest", epsilon=0.25)
    with pytest.warns(DeprecationWarning, match="^epsilon is now 1 - top_p.$"):
        assert loss.epsilon == 0.25
    with pytest.raises(TypeError, match="top_p is given twice"):
        RerankerCachedGISTEmbedLoss(model, scorer, candidates="nearest", top_p=0.9, epsilon=0.1)


@pytest.mark.parametrize(
    ("owner", "former", "present"),
    [
        (ServerState("a:1", "unused", None), "target", "address"),
        (ScoreMatrix((1, 1)), "seconds_waited", "wait_seconds"),
        (ScoreUsage(client_cached_pairs=3), "remembered_pairs", "client_cached_pairs"),
        (LossStatistics(client_cached_pairs=3), "remembered_pairs", "client_cached_pairs"),
        (LossStatistics(wait_seconds=3), "seconds_waited", "wait_seconds"),
        (LossStatistics(unscored_fraction=3), "unscored_share", "unscored_fraction"),
    ],
)
def test_attributes(owner: Any, former: str, present: str) -> None:
    with renamed(former, present) as warned:
        assert getattr(owner, former) == getattr(owner, present)
    assert warned[0].filename == __file__


def test_the_flag_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--batch", "8", "--step-seconds", "1"]
    with pytest.warns(FutureWarning, match="--target is now named --address"), pytest.raises(SystemExit):
        loss_client([*arguments, "--target", "nonsense"])
    assert "address 'nonsense' is not understood" in capsys.readouterr().err
    with pytest.warns(FutureWarning, match='"mass" is now a part of "nearest"'):
        assert loss_client([*arguments, "--candidates", "mass", "--pairs-per-second", "9"]) == 0
    assert "top_p 0.999" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        loss_client(["plan", "--help"])
    assert "--target" not in capsys.readouterr().out


def test_flags_and_variables_of_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reranker_service", "--model", str(tmp_path), "--max-calls=7", "--grace", "2"]
    result = forked.run(command, env={**os.environ, "RERANKER_GRACE": "soon"}, timeout=240)
    assert result.returncode == 1  # no model is there; the flag overrides the variable
    assert re.findall(r'event="former name" name=(\S+) use=(\S+)', result.stderr) == [
        ("--grace", "--graceful-timeout"),
        ("RERANKER_GRACE", "RERANKER_GRACEFUL_TIMEOUT"),
        ("--max-calls", "--max-concurrent-rpcs"),
    ]


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--grace", "soon"], {}, "graceful_timeout: "),
        (["--max-calls=0"], {}, "max_concurrent_rpcs: "),
        ([], {"RERANKER_GRACE": "soon"}, "graceful_timeout: "),
        ([], {"reranker_max_calls": "0"}, "max_concurrent_rpcs: "),
    ],
)
def test_former_settings_of_the_server_set_the_present_ones(
    arguments: list[str], environment: dict[str, str], words: str
) -> None:
    command = [sys.executable, "-m", "reranker_service", *arguments]
    result = forked.run(command, env={**os.environ, **environment}, timeout=240)
    assert result.returncode == 2
    assert words in result.stderr
