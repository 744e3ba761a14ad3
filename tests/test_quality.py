"""Tests of the quality study: data, batches, measures and report, and a very small run of the whole study."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from examples.docstrings import Pair
from examples.student import load_minilm
from quality import batches, report
from quality.cross_encoder import examples
from quality.guides import RememberingGuide, ScoredBatch, count_masked, evaluate, score
from quality.ledger import Ledger
from quality.plan import FULL, Margin, quick
from quality.run import Study
from quality.sources import KnownRelevance, code_pairs_of_source, split
from quality.study import parse

SOURCE = b'''
@decorated
def read(path, size):
    """Read a file in blocks of a size.

    More about it.
    """
    # a comment
    with open(path) as file:
        while block := file.read(size):
            yield block.strip().lower()

def short(path):
    """Too little code stands below this."""
    return path

def silent(path, size):
    return [piece for piece in path.read().splitlines() if len(piece) > size and piece.strip()]

class Reader:
    async def wait(self, event):
        """Wait until an event has come."""
        while not self.events.get(event):
            await self.loop.step(event, seconds=self.seconds)
'''


def pair(number: int, module: str = "package/file.py") -> Pair:
    return Pair(f"Summary number {number}.", f"The document with the number {number} says so.", module)


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformer:
    return load_minilm()


def test_code_is_a_functions_source_without_docstring_comments_and_decorators() -> None:
    assert code_pairs_of_source(SOURCE, "package/read.py") == [
        Pair(
            "Read a file in blocks of a size.",
            "def read(path, size): with open(path) as file: while (block := file.read(size)): "
            "yield block.strip().lower()",
            "package/read.py",
        ),
        Pair(
            "Wait until an event has come.",
            "def wait(self, event): while not self.events.get(event): "
            "await self.loop.step(event, seconds=self.seconds)",
            "package/read.py",
        ),
    ]


def test_the_three_parts_share_neither_modules_nor_texts() -> None:
    pairs = [pair(number % 150, f"package/file{number % 40}.py") for number in range(300)]
    parts = split(pairs, guide_share=0.4, held_out_share=0.3)
    assert all((parts.guide, parts.train, parts.held_out))
    texts = [{text for one in part for text in (one.summary, one.body)} for part in (parts.guide, parts.train)]
    texts.append({text for one in parts.held_out for text in (one.summary, one.body)})
    modules = [{one.module for one in part} for part in (parts.guide, parts.train, parts.held_out)]
    for kind in (texts, modules):
        assert not kind[0] & kind[1]
        assert not kind[0] & kind[2]
        assert not kind[1] & kind[2]


def test_a_document_is_known_to_answer_the_queries_that_it_is_paired_with() -> None:
    known = KnownRelevance([pair(1), Pair("summary NUMBER 1", "Another document, quite different.", "x.py"), pair(2)])
    assert known.answers("Summary number 1.", "another document - quite different")
    assert known.answers("Summary: number 1", pair(1).body)
    assert not known.answers(pair(2).summary, pair(1).body)
    assert not known.answers("Never seen.", pair(1).body)


def test_related_batches_are_neighbours_of_one_package(minilm: SentenceTransformer) -> None:
    pairs = [pair(number, f"{'ab'[number % 2]}/file{number // 4:02}.py") for number in range(60)]
    laid = batches.pool(pairs, "related", 7, 8, minilm)
    place = {(one.summary, one.body): one.module for one in pairs}
    modules = [[place[row] for row in batch] for batch in laid]  # type: ignore[index]
    assert all(len(batch) == 7 and len({module[0] for module in batch}) == 1 for batch in modules)
    assert len({row for batch in laid for row in batch}) == 8 * 7
    # A file has two pairs of each package, so seven neighbours are in at most five files.
    numbers = [{int(module[6:8]) for module in batch} for batch in modules]
    assert all(max(files) - min(files) <= 4 for files in numbers)


def test_mined_negatives_are_the_nearest_documents_of_other_pairs(minilm: SentenceTransformer) -> None:
    pairs = [pair(number) for number in range(20)]
    laid = batches.pool(pairs, "mined", 5, 3, minilm)
    bodies = [one.body for one in pairs]
    scores = minilm.similarity(minilm.encode([one.summary for one in pairs]), minilm.encode(bodies)).numpy()
    for anchor, positive, negative in (row for batch in laid for row in batch):
        row = [one.summary for one in pairs].index(anchor)
        assert positive == bodies[row]
        others = np.where(np.arange(20) == row, -2, scores[row])
        assert negative == bodies[int(others.argmax())]


def test_too_few_pairs_are_an_error(minilm: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="9 pairs make 2 batches of 4, but 3 are needed"):
        batches.pool([pair(number) for number in range(9)], "random", 4, 3, minilm)


def test_a_seed_draws_whole_batches_which_the_sampler_keeps(minilm: SentenceTransformer) -> None:
    laid = batches.pool([pair(number) for number in range(40)], "random", 5, 8, minilm)
    drawn = []
    for seed in (0, 1, 0):
        dataset = batches.for_seed(laid, 4, seed)
        assert dataset.column_names == ["anchor", "positive"]
        sampler = batches.in_order(dataset, batch_size=5, drop_last=True, generator=None, seed=3)
        drawn.append([[tuple(dataset[row].values()) for row in rows] for rows in sampler])
        assert all(batch in laid for batch in drawn[-1])
        assert len({batch[0] for batch in drawn[-1]}) == 4
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_remembering_guide_gives_the_models_embeddings_and_makes_each_once(
    minilm: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = RememberingGuide(minilm)
    texts = ["Open a file.", "Return the cosine of an angle that is given in radians.", "Open a file."]
    expected = minilm.encode(texts, convert_to_tensor=True)
    embedded: list[int] = []
    forward = SentenceTransformer.forward

    def count(self: SentenceTransformer, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        embedded.append(len(input["input_ids"]))
        return forward(self, input, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "forward", count)
    for asked in (texts, texts[:1], [*texts[1:], "Parse a date."]):
        found = guide.encode(asked, convert_to_tensor=True)
        assert torch.allclose(found[: len(asked)][0], expected[texts.index(asked[0])], atol=1e-5)
    assert sum(embedded) == 3


def scores_by_table(table: dict[tuple[str, str], float]) -> Any:
    def grid(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[table.get((q, d), 0.0) for d in documents] for q in queries], dtype=np.float32)

    return grid


def test_masked_negatives_are_counted_by_kind() -> None:
    # The document "b" is paired with the query "q" elsewhere; "A!" has the same words as "a".
    known = KnownRelevance([Pair("q", "a", ""), Pair("q", "b", ""), Pair("p", "b", ""), Pair("r", "A!", "")])
    table = {("q", "a"): 0.5, ("q", "b"): 0.45, ("q", "A!"): 0.5, ("q", "c"): 0.6, ("p", "b"): 1.0, ("r", "A!"): 1.0}
    batch = score([("q", "a", "c"), ("p", "b", "a"), ("r", "A!", "d")], scores_by_table(table), known)
    strict = count_masked([batch], Margin("absolute", 0.0))
    # Row q: "A!" and the "a" of row p are copies of its positive, "b" is another known one. Row r: both "a" are copies
    # of its positive "A!".
    assert {kind: strict[kind] for kind in ("known_copies", "known_others", "unknown")} == {
        "known_copies": 4,
        "known_others": 1,
        "unknown": 10,
    }
    # In row q, the equal text "a" is masked whatever its score; "A!" and "b" do not score above "a"; "c" does.
    assert (strict["masked_known_copies"], strict["masked_known_others"], strict["masked_unknown"]) == (1, 0, 1)
    wide = count_masked([batch], Margin("relative", 0.2))
    assert (wide["masked_known_copies"], wide["masked_known_others"], wide["masked_unknown"]) == (2, 1, 1)


def test_a_guide_is_evaluated_by_ranking_and_known_false_negatives() -> None:
    own = np.eye(4, dtype=np.bool_)
    known = own.copy()
    known[0, 1] = True
    good = np.where(known, 1.0, 0.0).astype(np.float32)

    def result(scores: NDArray[np.float32]) -> dict[str, float]:
        return evaluate([ScoredBatch(scores, known, own, own)])

    assert result(good) == {"ndcg": 1.0, "first": 1.0, "known_auc": 1.0, "known": 1, "queries": 4}
    bad = result(-good)
    assert bad["first"] == 0.0
    assert bad["known_auc"] == 0.0
    # The relevant document is the last of four; the first query has two relevant documents, the last two.
    last = 1 / math.log2(5)
    two = (1 / math.log2(4) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert bad["ndcg"] == pytest.approx((3 * last + two) / 4)


def test_the_cross_encoder_learns_from_no_known_false_negative(minilm: SentenceTransformer) -> None:
    pairs = [pair(number) for number in range(12)]
    pairs += [Pair(pairs[0].summary, f"{pairs[0].body} Elsewhere.", "y.py")]
    made = examples(pairs, 2, 1, minilm, random.Random(0))
    assert len(made) == 13 * 4
    relevant = {(one.summary, one.body) for one in pairs}
    assert {(query, document) for query, document, label in made if label == 1.0} == relevant
    assert not any((query, document) in relevant for query, document, label in made if label == 0.0)


def test_saved_results_outlive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    first = Ledger(path, "plan")
    first.add(("run", "a"), {"ndcg": 0.5})
    first.add(("run", "b"), {"ndcg": 0.25})
    Ledger(path, "another plan").add(("run", "c"), {"ndcg": 1.0})
    path.write_text(path.read_text() + '{"plan": "plan", "key": ["run", "d"')
    again = Ledger(path, "plan")
    again.add(("run", "e"), {"ndcg": 0.125})
    assert Ledger(path, "plan").under("run") == {
        ("a",): {"ndcg": 0.5},
        ("b",): {"ndcg": 0.25},
        ("e",): {"ndcg": 0.125},
    }
    assert ("run", "c") not in again
    assert ("run", "c") in Ledger(path, "another plan")


def run_record(ndcg: float, negatives: int = 0, masked: int = 0, scored: int = 0) -> dict[str, Any]:
    return {"ndcg": ndcg, "negatives": negatives, "masked": masked, "pairs_scored": scored, "anchors": 20}


def test_gains_are_differences_within_a_seed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", "plan")
    for seed, plain, ours in (("0", 0.30, 0.34), ("1", 0.40, 0.42), ("2", 0.35, 0.38)):
        ledger.add(("run", "code", "large", "no filter", seed), run_record(plain))
        ledger.add(("run", "code", "large", "cross-encoder, absolute 0", seed), run_record(ours, 180, 18, 100))
    row = report.rows(ledger)["code", "large", "cross-encoder, absolute 0"]
    assert list(row.gain.values()) == pytest.approx([0.04, 0.02, 0.03])
    # The standard deviation of 0.04, 0.02, 0.03 is 0.01.
    assert report.standard_error(row.gain.values()) == pytest.approx(0.01 / math.sqrt(3))
    assert report.standard_error([0.5]) is None
    assert (row.masked, row.scored) == (0.1, 0.5)
    text = report.tables(ledger)
    assert "| cross-encoder, absolute 0 | 0.380 ± 0.023 | +0.030 ± 0.006 | 10.0% | 50.0% |" in text
    assert "| no filter | 0.350 ± 0.029 | +0.000 ± 0.000 |  |  |" in text

    report.write_figures(tmp_path / "figures.json", ledger)
    by_name = {one["figure"]: one for one in json.loads((tmp_path / "figures.json").read_text())}
    gain = by_name["code; large; cross-encoder, absolute 0: nDCG@10 above no filter"]
    assert [gain[key] for key in ("value", "low", "high")] == pytest.approx([0.03, 0.02, 0.04])
    report.draw_gains(tmp_path / "gains.png", ledger)
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_a_plans_digest_changes_with_the_settings_that_results_depend_on() -> None:
    assert FULL.digest != replace(FULL, learning_rate=1.0).digest
    smaller = replace(FULL.regimes[0], steps=3)
    assert FULL.digest != replace(FULL, regimes=(smaller, *FULL.regimes[1:])).digest
    without = replace(FULL.regimes[0], served=())
    assert FULL.digest == replace(FULL, seeds=(5,), regimes=(without, *FULL.regimes[1:])).digest


@pytest.mark.usefixtures("forked_children")
def test_a_small_study_runs_from_texts_to_tables_and_a_second_run_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(quick(), regimes=quick().regimes[:1])
    said: list[str] = []
    Study(plan, tmp_path, "torch", said.append).run()
    ledger = (tmp_path / "quality" / "ledger.jsonl").read_text()
    found = Ledger(tmp_path / "quality" / "ledger.jsonl", plan.digest)
    runs = found.under("run")
    (regime,) = plan.regimes
    assert len(runs) == 2 + len(regime.hardness) + len(regime.served) == 5
    assert all(0 < one["ndcg"] <= 1 for one in runs.values())
    # The local guide's filter and the measured filters of the served guide count the same pairs.
    local = runs["code", regime.name, "local guide, absolute 0", "0"]
    assert local["pairs_scored"] == regime.steps * regime.batch_size * 2 * regime.batch_size
    measured = found.under("filter", "code", regime.name, "bi-encoder")
    sizes = {one["known_copies"] + one["known_others"] + one["unknown"] for one in measured.values()}
    assert sizes == {regime.pool * regime.batch_size * (2 * regime.batch_size - 1)}
    assert all(
        (tmp_path / name).stat().st_size > 0
        for name in ("quality.json", "quality.md", "quality.png", "quality-margins.png")
    )
    for log in ("bi-encoder.log", "cross-encoder.log"):
        assert "event=stopped status=0" in (tmp_path / "quality" / log).read_text()
    assert not any("was trained before" in line for line in said)

    # The second run has no servers: any call would fail.
    absent = SimpleNamespace(wait_ready=lambda: "127.0.0.1:1")
    monkeypatch.setattr("quality.run.reranker_server", lambda *_: nullcontext(absent))
    Study(plan, tmp_path, "torch", said.append).run()
    assert any("was trained before" in line for line in said)
    assert (tmp_path / "quality" / "ledger.jsonl").read_text() == ledger


def test_the_command_line_names_the_argument_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--quick"]).quick
    with pytest.raises(SystemExit) as caught:
        parse(["--seeds", "0"])
    assert caught.value.code == 2
    assert "--seeds" in capsys.readouterr().err
