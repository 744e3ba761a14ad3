"""Tests of the demo: its parts against independent references, and a very small run over a real socket."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

from examples import train
from examples.contenders import CountingGISTEmbedLoss, FilterCounts
from examples.docstrings import Pair, collect
from examples.intervals import paired_difference
from examples.prefetch import FixedTimeReranker, StepTimes
from examples.processes import ProcessError
from examples.report import Result, draw, table, verdict
from examples.serving import reranker_server
from examples.student import load_minilm, load_student, mine_triplets, retrieval_evaluator
from examples.triplets import Judged, lines, striking
from loss_client.compare.intervals import Interval, ndcg

from . import forked
from .servers import ServerProcess

PAIRS = [
    Pair("Open a file and return a stream.", "The file is opened for reading unless the mode says otherwise.", "a.py"),
    Pair(
        "Return the cosine of an angle.", "The angle is measured in radians; the result lies between -1 and 1.", "a.py"
    ),
    Pair("Parse a date from a string.", "The text has to be in ISO format, such as 2020-01-31, else it fails.", "b.py"),
    Pair("Sort the list in place.", "The sort is stable: equal elements keep the order that they had before.", "c.py"),
]


@pytest.fixture(scope="module")
def guide() -> SentenceTransformer:
    return load_minilm()


@pytest.fixture(scope="module")
def small_student() -> SentenceTransformer:
    return load_student()


def test_the_student_is_the_first_layers_of_the_real_model(
    guide: SentenceTransformer, small_student: SentenceTransformer, tmp_path: Path
) -> None:
    features = guide.preprocess(["Open a file and return a stream."])
    hidden = guide[0].auto_model(**features, output_hidden_states=True).hidden_states
    third = small_student[0].auto_model(**features).last_hidden_state
    assert torch.allclose(third, hidden[3], atol=1e-6)
    small_student.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.allclose(again.encode("a file", convert_to_tensor=True), _embed(small_student, "a file"), atol=1e-6)


def _embed(model: SentenceTransformer, text: str) -> torch.Tensor:
    return model.encode(text, convert_to_tensor=True)


def test_mined_negatives_are_the_nearest_documents_of_other_pairs(guide: SentenceTransformer) -> None:
    other = Pair("Open it.", "Opens a file and gives back a stream to read from it.", "d.py")
    triplets, share_above = mine_triplets(PAIRS, [other], guide)
    assert triplets["anchor"][:] == [pair.summary for pair in PAIRS]
    assert triplets["positive"][:] == [pair.body for pair in PAIRS]
    corpus = [*(pair.body for pair in PAIRS), other.body]
    scores = guide.similarity(guide.encode(triplets["anchor"][:]), guide.encode(corpus))
    own = scores.diagonal().clone()
    scores.fill_diagonal_(-2)
    assert triplets["negative"][:] == [corpus[int(best)] for best in scores.argmax(dim=1)]
    assert share_above == pytest.approx(float((scores.max(dim=1).values > own).float().mean()))
    assert share_above > 0


def test_equal_texts_are_one_document_and_one_query(guide: SentenceTransformer) -> None:
    copies = [
        Pair(PAIRS[0].summary.upper(), PAIRS[1].body, "x.py"),
        Pair("Another summary altogether.", PAIRS[2].body.upper(), "x.py"),
    ]
    evaluator = retrieval_evaluator([*PAIRS, *copies], queries=100, seed=0)
    assert len(evaluator.corpus) == len(PAIRS)
    asked = dict(zip(evaluator.queries, evaluator.queries_ids, strict=True))
    assert len(asked) == len(PAIRS) + 1
    relevant = {query: evaluator.relevant_docs[name] for query, name in asked.items()}
    assert {document.lower() for document in relevant[PAIRS[0].summary]} == {
        PAIRS[0].body.lower(),
        PAIRS[1].body.lower(),
    }
    assert relevant["Another summary altogether."] == relevant[PAIRS[2].summary]
    assert len(retrieval_evaluator(PAIRS, queries=2, seed=0).queries) == 2
    measured = evaluator(guide)["held-out_cosine_ndcg@10"]
    assert measured > 0.8
    # The mean of the values by query is sentence-transformers' own figure.
    assert len(evaluator.ndcg_by_query) == len(evaluator.queries)
    assert np.mean(evaluator.ndcg_by_query) == pytest.approx(measured, abs=1e-9)


@pytest.mark.parametrize("mini_batch_size", [3, 32])
def test_the_local_guide_counts_what_it_masks(
    guide: SentenceTransformer, small_student: SentenceTransformer, mini_batch_size: int
) -> None:
    columns = [
        [pair.summary for pair in PAIRS],
        [pair.body for pair in PAIRS],
        [f"{pair.body[:40]} And so on." for pair in PAIRS[1:] + PAIRS[:1]],
        [pair.summary for pair in PAIRS],
    ]
    counting = CountingGISTEmbedLoss(small_student, guide, 0.05, mini_batch_size)
    plain = CachedGISTEmbedLoss(
        small_student,
        guide,
        temperature=0.05,
        mini_batch_size=mini_batch_size,
        contrast_anchors=False,
        contrast_positives=False,
    )
    small_student.eval()
    values = [loss([small_student.preprocess(column) for column in columns], None) for loss in (plain, counting)]
    assert values[0] == values[1]

    anchors, *documents = (guide.encode(column) for column in columns)
    scores = torch.cat([guide.similarity(anchors, column) for column in documents], dim=1)
    masked = int((scores > scores.diagonal().unsqueeze(1)).sum())
    # The last column repeats the anchors, so each anchor has itself as a negative, which scores above its positive.
    assert masked >= len(PAIRS)
    assert counting.counts == FilterCounts(pairs_scored=4 * 12, negatives=4 * 11, masked=masked)


def test_ndcg_of_a_query_has_its_closed_form() -> None:
    assert ndcg(["a", "b"], {"a"}) == 1
    assert ndcg(["b", "a"], {"a"}) == pytest.approx(1 / math.log2(3))
    # One of two relevant documents is found, at the second place.
    assert ndcg(["c", "a"], {"a", "b"}) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert ndcg([*"bcdefghijk", "a"], {"a"}) == 0


def test_the_interval_of_a_paired_difference_is_that_of_the_normal_distribution() -> None:
    generator = np.random.default_rng(7)
    baseline = generator.random(400)
    values = baseline + generator.normal(0.03, 0.2, size=400)
    found = paired_difference(list(values), list(baseline), samples=4_000)
    difference = values - baseline
    half = 1.96 * difference.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(difference.mean())
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=0.1 * half)
    # What both models share does not widen the interval.
    assert paired_difference([0.9, 0.4, 0.1], [0.8, 0.3, 0.0]) == Interval(*[pytest.approx(0.1)] * 3)


def test_the_shown_triplets_are_those_whose_negative_leads_by_most_and_are_readable() -> None:
    text = "The file is opened for reading"
    judged = [
        Judged("open a file", "Sort the list in place", text, 0.5, 0.6),
        Judged("open the file", "Return the cosine of an angle", "Another text about files", 0.5, 0.9),
        Judged("open this file", "Parse a date from a string", "Another text about files", 0.5, 0.8),
        Judged("open one file", text, f"{text.upper()} unless the mode says otherwise", 0.1, 0.9),
        Judged("open two files", "x : (n, 3), y : 0.5 * [1, 2, 3] == {}", "A text in words", 0.1, 0.9),
        Judged("open no file", "A text that scores best", "A text that scores worse", 0.9, 0.5),
    ]
    assert [one.anchor for one in striking(judged, 3)] == ["open the file", "open a file"]
    assert [one.anchor for one in striking(judged, 1)] == ["open the file"]


def test_texts_of_a_triplet_take_two_lines_at_most() -> None:
    shown = list(lines(Judged("short", "seven words that need two lines here", "word " * 40, 0.25, 0.75), width=40))
    assert all(len(line) <= 40 for line in shown)
    assert [line.split() for line in shown[:3]] == [
        ["anchor", "short"],
        ["positive", "0.250", "seven", "words", "that", "need"],
        ["two", "lines", "here"],
    ]
    assert len(shown) == 5
    assert shown[-1].endswith("...")


def test_the_reranker_of_fixed_speed_finishes_one_job_after_the_other() -> None:
    began = time.monotonic()
    reranker = FixedTimeReranker(0.05)
    first, second = reranker.stream_grid(["a", "b"], ["c"]), reranker.stream_grid(["a"], ["b", "c"])
    assert second.rows(0, 1).shape == (1, 2)
    assert time.monotonic() - began >= 0.1
    assert first.rows(0, 2).shape == (2, 1)
    assert first.wait_seconds == 0
    assert 0 < second.wait_seconds <= 0.1


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (Interval(0.1, 0.05, 0.15), "a filter is better than no filter: +0.100 nDCG@10, 95% interval +0.050 to +0.150"),
        (Interval(0.1, -0.05, 0.25), "a filter is not distinguishable from no filter: +0.100 nDCG@10"),
        (Interval(-0.1, -0.15, -0.05), "a filter is worse than no filter: -0.100 nDCG@10"),
    ],
)
def test_the_report_shows_the_results(tmp_path: Path, gain: Interval, said: str) -> None:
    results = [
        Result("untrained student", "", 0.2, 0.1),
        Result("no filter", "PlainLoss", 0.5, 0.4, 1.25),
        Result("a filter", "FilteredLoss", 0.4, 0.3, 2.5, FilterCounts(2_000, 1_000, 250, 3.0), gain=gain),
    ]
    console = Console(width=100, record=True, file=(tmp_path / "console").open("w"))
    console.print(table(results, "no filter", queries=2_500))
    printed = console.export_text()
    row = next(line for line in printed.splitlines() if "a filter" in line)
    assert row.split() == ["a", "filter", "0.400", *str(gain).split(), "2.50", "25.0%"]
    assert said in verdict(results, "no filter", queries=2_500)
    draw(tmp_path / "plot.png", results, "no filter", queries=2_500)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_about_prefetch_has_all_four_times() -> None:
    assert str(StepTimes(0.4, 0.5, 0.55, 0.8)) == (
        "Prefetch: a reranker on another machine that takes 0.40 s for a batch makes a step of 0.50 s last 0.55 s with "
        "prefetch and 0.80 s without."
    )


@pytest.mark.usefixtures("forked_children")
def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    flags = ["--model", str(tmp_path / "no-such-model")]
    with reranker_server(tmp_path / "server.log", "torch", flags) as server:
        with pytest.raises(ProcessError, match=r"(?s)ended before it was ready.*no-such-model") as failure:
            server.wait_ready()
    assert str(tmp_path / "server.log") in str(failure.value)


def test_a_server_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    # Child processes of other tests' fixtures may be running.
    others = set(psutil.Process().children())
    with reranker_server(tmp_path / "server.log", "torch") as server:
        (process,) = set(psutil.Process().children()) - others
        with pytest.raises(ProcessError, match="took more than 0 s until it was ready"):
            server.wait_ready(seconds=0.01)
    assert not process.is_running()


def demo(output: Path, *flags: str) -> list[str]:
    small = ["--steps", "3", "--batch-size", "8", "--pairs", "600", "--mined-documents", "150", "--queries", "40"]
    return [sys.executable, "-m", "examples.demo", *small, "--engine", "torch", "--output", str(output), *flags]


def test_a_small_run_from_docstrings_to_table_plot_and_model(tmp_path: Path) -> None:
    done = forked.run(demo(tmp_path), timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr

    found = json.loads((tmp_path / "results.json").read_text())
    _, plain, filtered, distilled = found["results"]
    assert [one["loss"] for one in found["results"]] == [
        "",
        "CachedMultipleNegativesRankingLoss",
        "RerankerCachedGISTEmbedLoss",
        "RerankerCachedGISTEmbedLoss",
    ]
    assert all(one["step_seconds"] > 0 for one in (plain, filtered, distilled))
    assert [one["gain"] is None for one in found["results"]] == [True, True, False, False]
    assert filtered["gain"]["mean"] == pytest.approx(filtered["ndcg"] - plain["ndcg"], abs=1e-9)
    assert plain["counts"]["pairs_scored"] == 0
    # Three steps of 8 anchors with 16 documents each. The service scores each distinct text once.
    assert filtered["counts"]["negatives"] == 3 * 8 * 15
    assert 0 < filtered["counts"]["pairs_scored"] <= 3 * 8 * 16
    assert filtered["counts"]["masked"] > 0
    # Both masks are the same, from probabilities and from raw scores, and the second training needs no new scores.
    assert [filtered["counts"][name] for name in ("pairs_scored", "negatives", "masked")] == [
        distilled["counts"][name] for name in ("pairs_scored", "negatives", "masked")
    ]
    assert distilled["counts"]["pairs_cached"] == distilled["counts"]["pairs_scored"]
    # Student, first batch and dropout are the same. The filter removes negatives, so that the first loss decreases;
    # distillation adds a term that is not negative.
    assert [[step for step, _ in one["losses"]] for one in (plain, filtered, distilled)] == [[1, 2, 3]] * 3
    first = [one["losses"][0][1] for one in (plain, filtered, distilled)]
    assert first[1] <= first[0] + 1e-4
    assert first[2] >= first[1] - 1e-4
    assert all(seconds > 0 for seconds in found["prefetch"].values())

    # The output: as many triplets as have a readable negative, the progress, what came out, and how to load the model.
    assert found["mined_negatives_above_positive"] > 0
    assert "  negative  0." in done.stdout
    assert " masked " in done.stdout
    assert "What came out, with one seed and 40 queries: filter is " in done.stdout
    assert "Prefetch: " in done.stdout
    assert f'SentenceTransformer("{tmp_path / "model"}")' in done.stdout
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert not torch.equal(_embed(model, "a file"), _embed(load_student(2), "a file"))
    assert "RerankerCachedGISTEmbedLoss" in (tmp_path / "model" / "README.md").read_text()
    assert "event=stopped status=0" in (tmp_path / "server.log").read_text()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    process = forked.ForkedProgram(
        demo(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        assert "Starting the reranker server" in process.stdout.readline()
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, rest
    assert not any(one.is_running() for one in started)


def test_the_short_program_trains_against_a_running_server(bi_encoder_server: ServerProcess, tmp_path: Path) -> None:
    train.main([bi_encoder_server.address, "--tiny", "--output", str(tmp_path)])
    trained = SentenceTransformer(str(tmp_path), device="cpu")
    text = collect(1, ["stdlib"])[0].summary
    assert not torch.equal(_embed(trained, text), _embed(load_student(), text))
