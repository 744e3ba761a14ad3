"""The command ``compare``: trainings of a tiny student against a real server, and the report of their results."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from loss_client.__main__ import main
from loss_client.client.client import RerankerClient
from loss_client.compare import command, training
from loss_client.compare.evaluation import evaluator_of
from loss_client.compare.methods import methods_of
from loss_client.compare.report import Result, report
from loss_client.rows import RowsError

from .models import build_bi_encoder
from .servers import ServerProcess
from .training import texts

METHODS = methods_of(("all",))
NEAREST = ("filter, nearest", "filter + distillation, nearest")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny student, 48 training rows with a mined negative, and 16 held-out rows."""
    directory = tmp_path_factory.mktemp("compare")
    build_bi_encoder(directory / "student")
    rows = [dict(zip(("anchor", "positive", "negative"), row, strict=True)) for row in zip(*texts(3, 64), strict=True)]
    for name, part in (("train", rows[:48]), ("eval", rows[48:])):
        (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps({'id': 1, **row})}\n" for row in part))
    return directory


def compare(files: Path, server: ServerProcess, output: Path, *flags: str) -> int:
    paths = ("--model", files / "student", "--train", files / "train.jsonl", "--eval", files / "eval.jsonl")
    sizes = ("--steps", "2", "--batch-size", "8", "--mini-batch-size", "4", "--learning-rate", "1e-3")
    return main(
        [
            "compare",
            *map(str, paths),
            "--address",
            server.address,
            "--output",
            str(output),
            "--seeds",
            "2",
            *sizes,
            *flags,
        ]
    )


def test_a_comparison_trains_evaluates_and_goes_on_after_a_stop(
    files: Path,
    cross_encoder_server: ServerProcess,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, trained, train = tmp_path / "comparison.jsonl", [], training.train
    batches: dict[tuple[str, int], list[Any]] = {}

    def watched(name: str, method: str, seed: int, dataset: Any, *rest: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((method, seed))
        take = training.RerankerTrainer.training_step

        def step(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
            batches.setdefault((method, seed), []).append(
                [value.tolist() for key, value in sorted(inputs.items()) if key.endswith("input_ids")]
            )
            return take(self, model, inputs, *more)

        with monkeypatch.context() as patch:
            patch.setattr(training.RerankerTrainer, "training_step", step)
            return train(name, method, seed, dataset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", watched)
    assert compare(files, cross_encoder_server, output) == 130
    trained.append(("interrupted", 0))  # no further interrupt
    assert compare(files, cross_encoder_server, output) == 0
    del trained[3]
    assert trained == [(method, seed) for seed in (1, 2) for method in METHODS], "each was trained once"
    for seed in (1, 2):
        first = batches[METHODS[0], seed]
        assert len(first) == 2
        assert all(batches[method, seed] == first for method in METHODS), "the same batches for every method"
    assert batches[METHODS[0], 1] != batches[METHODS[0], 2]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 9
    of = {(row["method"], row["seed"]): np.array(row["ndcg"]) for row in rows}
    assert all(values.shape == (16,) for values in of.values())
    printed = capsys.readouterr().out
    for method in METHODS:
        mean = np.mean([of[method, seed] for seed in (1, 2)])
        assert re.search(rf"^{re.escape(method)} +{mean:.3f} ", printed, flags=re.MULTILINE)
    assert "95% intervals over 2 seeds and 16 queries" in printed
    with pytest.raises(SystemExit, match="2"):
        compare(files, cross_encoder_server, output, "--seeds", "0")
    assert compare(files, cross_encoder_server, output, "--margin", "0.1") == 1
    assert "was begun with margin 0.05, not 0.1" in capsys.readouterr().err

    # A later run adds the nearest pairs, and trains nothing again.
    trained.clear()
    trained += [("interrupted", 0)] * 4
    asked = count_pairs(monkeypatch)
    nearest = ("--candidates", "all,nearest", "--preselector", str(files / "student"), "--per-anchor", "2")
    assert compare(files, cross_encoder_server, output, "--seeds", "1", *nearest) == 0
    assert trained[4:] == [(method, 1) for method in NEAREST]
    assert asked["grid"] == 0
    # A batch has 8 anchors and 16 documents: 16 pairs of own documents, 16 preselected and at most 8 random ones. Two
    # batches of each training are trained on, and a third may have been begun ahead. All pairs would be 128 a batch.
    assert 2 * 2 * (16 + 16) <= asked["listed"] <= 2 * 3 * (16 + 16 + 8)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["scored_fraction"] for row in rows[1:9]] == [None, None, 1.0, 1.0] * 2
    assert [row["scored_fraction"] for row in rows[9:]] == [32 / 128] * 2
    printed = capsys.readouterr().out
    assert re.search(r"^filter, nearest +\S+ .* 25\.0% ", printed, flags=re.MULTILINE)
    for method, other in zip(NEAREST, METHODS[2:], strict=True):
        assert re.search(
            rf"^{re.escape(f'{method} ')}.*{re.escape(f' {other}, which scores all pairs: ')}", printed, re.M
        )


def count_pairs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the pairs that clients ask for from now on, as grids and in lists."""
    asked = {"grid": 0, "listed": 0}
    grid, pairs = RerankerClient.stream_grid, RerankerClient.stream_pairs

    def stream_grid(self: RerankerClient, queries: Any, documents: Any, **options: Any) -> Any:
        asked["grid"] += len(queries) * len(documents)
        return grid(self, queries, documents, **options)

    def stream_pairs(self: RerankerClient, queries: Any, documents: Any, query_ids: Any, *ids: Any, **rest: Any) -> Any:
        asked["listed"] += len(query_ids)
        return pairs(self, queries, documents, query_ids, *ids, **rest)

    monkeypatch.setattr(RerankerClient, "stream_grid", stream_grid)
    monkeypatch.setattr(RerankerClient, "stream_pairs", stream_pairs)
    return asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--candidates", "near"), "'near': there is no such mode; right are all, nearest"),
        (("--candidates", "nearest"), "--candidates nearest needs --preselector, or --top-p"),
        (("--per-anchor", "4"), "--per-anchor goes with --candidates nearest"),
        (("--candidates", "nearest", "--top-p", "0.9", "--per-anchor", "4"), "--per-anchor goes with --preselector"),
        (("--candidates", "nearest", "--top-p", "1"), "'1' has to be a number between 0 and 1"),
        (("--candidates", "nearest", "--preselector", "m", "--per-anchor", "0"), "'0' has to be a number above 0"),
    ],
)
def test_options_of_nearest_pairs_that_do_not_fit_are_refused(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ("--model", "m", "--train", "t", "--eval", "e", "--address", "a:1", "--steps", "1")
    with pytest.raises(SystemExit, match="2"):
        main(["compare", *needed, *flags])
    assert message in capsys.readouterr().err


def test_a_preselector_is_an_address_a_directory_or_a_name(files: Path, cross_encoder_server: ServerProcess) -> None:
    with ExitStack() as resources:
        served = command._preselector(cross_encoder_server.address, resources)
        assert isinstance(served, RerankerClient)
        assert served.model_info().fingerprint
        local = command._preselector(str(files / "student"), resources)
        assert isinstance(local, SentenceTransformer)
        with pytest.raises(OSError, match="--preselector no/model is no address, and no model"):
            command._preselector("no/model", resources)


def test_the_report_says_what_the_intervals_say() -> None:
    draw = np.random.default_rng(0)
    base = draw.uniform(0, 0.5, (3, 200))
    gain = {"no filter": 0.0, "hardness": 0.02, "filter": 0.1, "filter + distillation": 0.0}
    noise = {method: draw.normal(0, 0.01, (3, 200)) for method in METHODS}
    results = [
        Result(method, seed, list(base[seed] + gain[method] + noise[method][seed]), 1.0, None)
        for seed in range(3)
        for method in METHODS
    ]
    printed = report(results, list(base[0])).splitlines()
    assert printed[-2].startswith("filter is better than hardness, the best without a reranker: +0.08")
    assert printed[-1].startswith("filter + distillation is worse than hardness, the best without a reranker: -0.0")
    equal = [Result(method, 1, list(base[0] + draw.normal(0, 0.1, 200)), 1.0, None) for method in METHODS]
    assert "cannot be told from" in report(equal, list(base[0])).splitlines()[-1]
    assert "200 queries of 1 seed" in report(equal, list(base[0]))


def test_the_report_compares_nearest_pairs_with_all_pairs() -> None:
    draw = np.random.default_rng(0)
    base = draw.uniform(0, 0.5, 200)
    gain = {"filter": 0.1, "filter, nearest": 0.08, "filter + distillation, nearest": 0.2}
    results = [
        Result(method, 1, list(base + gain.get(method, 0) + draw.normal(0, 0.01, 200)), 1.0, None, 0.25)
        for method in methods_of(("all", "nearest"))
    ]
    printed = report(results, list(base)).splitlines()
    assert printed[-2].startswith("filter, nearest is worse than filter, which scores all pairs: -0.0")
    assert printed[-1].startswith("filter + distillation, nearest is better than filter + distillation, which scores")
    alone = [one for one in results if one.method in methods_of(("nearest",))]
    assert "all pairs" not in report(alone, list(base))
    assert [head for head in printed[0].split() if head == "scored"]
    assert "scored" not in report(results[:4], list(base)).splitlines()[0]


def test_held_out_rows_make_queries_and_documents() -> None:
    rows = [{"id": 1, "q": "a", "d": "one", "n": "no"}, {"id": 2, "q": "a", "d": ["two", "three"], "n": None}]
    evaluator = evaluator_of(rows, [{"text": "four"}])
    assert evaluator.queries == ["a"]
    assert set(evaluator.corpus) == {"one", "no", "two", "three", "four"}
    assert evaluator.relevant_docs == {"a": {"one", "two", "three"}}
    with pytest.raises(RowsError, match="row 1 of the evaluation has to hold a query"):
        evaluator_of([{"q": "a"}])
