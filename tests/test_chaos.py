"""Short form of ``make chaos``: each fault once while small jobs run; and the counts that the table is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chaos import model
from chaos.jobs import run_job
from chaos.ledger import CountedMatrix, Ledger, counted_matrices
from chaos.report import Outcome, append, explanations, table
from chaos.run import QUICK, Run
from chaos.scores import numbers_of, raw_scores, raw_scores_of_texts, text_of, vocabulary
from chaos.suite import FAULTS, inject
from loss_client.client.stream import _Stream

from .forked import ensure_fork_server

# Envoy has to be installed first, the clock needs a fork server of its own, and vLLM takes minutes.
SHORT = [name for name in FAULTS if name not in ("envoy", "clock", "vllm")]
ONCE = replace(QUICK, times=1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.build(tmp_path_factory.mktemp("chaos") / "model")


@pytest.fixture(scope="module")
def outcomes(served: Path) -> Iterator[dict[str, Future[Outcome]]]:
    """All faults at the same time, because the servers' engines sleep most of the time."""
    ensure_fork_server()
    with counted_matrices(), ThreadPoolExecutor(len(SHORT)) as threads:
        yield {name: threads.submit(inject, name, ONCE, served) for name in SHORT}


@pytest.mark.parametrize("name", SHORT)
def test_no_caller_sees_a_fault(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome = outcomes[name].result()
    assert outcome.clean, json.dumps(outcome.record())  # a string, because pytest shortens others


def test_texts_are_tokens_that_give_their_numbers() -> None:
    numbers = [0, 7, 1000, 123_456_789, 999_999_999]
    words = vocabulary()
    ids = np.array([[words[word] for word in text_of(number).split()] for number in numbers], dtype=np.int32)
    assert numbers_of(ids).tolist() == numbers
    scores = raw_scores_of_texts([text_of(number) for number in numbers], [text_of(number) for number in numbers], 0)
    grid = np.array(numbers)
    np.testing.assert_array_equal(scores, raw_scores(grid[:, None], grid[None, :], 0))
    assert len(np.unique(scores)) == scores.size  # a swapped pair has another score
    assert not (scores == raw_scores(grid[:, None], grid[None, :], 1)).any()


def test_the_ledger_counts_wrong_missing_and_repeated_scores() -> None:
    matrix, right = CountedMatrix((2, 3)), np.arange(6, dtype=np.float32).reshape(2, 3)
    matrix.put(slice(0, 1), slice(0, 3), right[:1])
    matrix.put(slice(1, 2), slice(0, 2), np.array([[3.0, 9.0]], dtype=np.float32))
    with pytest.raises(ValueError, match="arrived before"):
        matrix.put(slice(0, 1), slice(1, 2), right[:1, 1:2])
    ledger = Ledger()
    ledger.job(matrix, right)
    assert (ledger.asked, ledger.wrong, ledger.missing, ledger.twice) == (6, 1, 1, 1)


def test_a_client_that_mixes_up_chunks_is_found_out(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = _Stream._accept

    def swap(stream: _Stream, result: object) -> None:
        if len(stream.unanswered) > 1:
            first, second, *_ = stream.unanswered
            if stream.unanswered[first].pairs == stream.unanswered[second].pairs:
                chunks = stream.unanswered
                chunks[first], chunks[second] = chunks[second], chunks[first]
        accept(stream, result)

    monkeypatch.setattr(_Stream, "_accept", swap)
    run = Run(ONCE, served, tmp_path)
    with counted_matrices(), run.serving(1) as servers, run.client(servers) as client:
        run_job(client, run.ledger, side=64)
    assert run.ledger.wrong
    assert not run.outcome("swapped").clean


def test_scores_of_another_model_are_found_out(served: Path, tmp_path: Path) -> None:
    run = Run(ONCE, served, tmp_path)
    with counted_matrices(), run.serving(1) as servers, run.client(servers) as client:
        run_job(client, run.ledger, side=16, seed=1)
    assert run.ledger.wrong == run.ledger.asked == 256
    assert run.outcome("model").scored == 256 + 2  # and the server's own known answer


def test_the_report_says_what_is_wrong(tmp_path: Path) -> None:
    good = Outcome("good", 1, 1, Ledger(jobs=1, asked=10), scored=11)
    few = Outcome("few", 2, 1, Ledger(jobs=1, asked=10), scored=10)
    bad = Outcome("bad", 1, 1, Ledger(jobs=1, asked=10, wrong=1, errors=["it failed"]), scored=10)
    skipped = Outcome("skipped", skipped="there is none")
    assert [one.clean for one in (good, few, bad, skipped)] == [True, False, False, True]
    assert good.done_twice == pytest.approx(0.1)
    assert [line.split(":")[0] for line in explanations([good, few, bad, skipped])] == ["few", "bad", "skipped"]
    assert table([good, few, bad, skipped]).row_count == 4
    for one in (good, skipped):
        append(tmp_path / "chaos.jsonl", one)
    records = [json.loads(line) for line in (tmp_path / "chaos.jsonl").read_text().splitlines()]
    assert (records[0]["asked"], records[1]["skipped"]) == (10, "there is none")
