"""Tests of the quality study: data, batches, measures and report, and a very small run of the whole study."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score  # type: ignore[import-untyped]

from examples.docstrings import Pair
from examples.student import load_minilm, load_student, retrieval_evaluator
from loss_client import Distillation
from loss_client.compare.intervals import bootstrap
from loss_client.loss import RerankerCachedGISTEmbedLoss
from quality import batches, contenders, evaluation, report
from quality.cross_encoder import examples
from quality.guides import RememberingGuide, ScoredBatch, count_masked, evaluate, score
from quality.intervals import pack, unpack
from quality.ledger import Ledger
from quality.mean_guide import MeanScorer, Member, onto
from quality.plan import FULL, Margin, Served, quick
from quality.run import Study
from quality.sources import KnownRelevance, code_pairs_of_source, split
from quality.study import parse

from .training import (
    MemoryScorer,
    assert_same_gradients,
    features,
    gradients,
    loss_and_gradients,
    random_scores,
    texts,
)

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


def test_seeds_share_no_batch_and_the_sampler_keeps_their_batches(minilm: SentenceTransformer) -> None:
    laid = batches.pool([pair(number) for number in range(40)], "random", 5, 8, minilm)
    drawn = []
    for seed in (0, 1):
        dataset = batches.for_seed(laid, 4, seed)
        assert dataset.column_names == ["anchor", "positive"]
        sampler = batches.in_order(dataset, batch_size=5, drop_last=True, generator=None, seed=3)
        drawn += [[tuple(dataset[row].values()) for row in rows] for rows in sampler]
    assert sorted(drawn) == sorted(laid)
    assert len({row for batch in drawn for row in batch}) == 40
    with pytest.raises(ValueError, match="8 batches are enough for 2 seeds of 4, not for seed 2"):
        batches.for_seed(laid, 4, 2)


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


def all_resamples(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of every resample of seeds and queries; all are equally likely."""
    seeds, queries = values.shape
    return np.array(
        [
            np.mean([values[seed, query] for seed in of_seeds for query in of_queries])
            for of_seeds in product(range(seeds), repeat=seeds)
            for of_queries in product(range(queries), repeat=queries)
        ]
    )


def test_an_interval_is_that_of_all_resamples_of_seeds_and_queries() -> None:
    draw = np.random.default_rng(3)
    values = [draw.normal(0.1, 1.0, (3, 4)), draw.normal(-0.2, 0.5, (2, 3))]
    exact = all_resamples(values[0])
    found = bootstrap(values[:1], level=0.8, resamples=40_000)
    assert found.mean == pytest.approx(values[0].mean())
    # The interval's ends, as shares of all resamples.
    assert np.mean(exact < found.low) == pytest.approx(0.1, abs=0.01)
    assert np.mean(exact > found.high) == pytest.approx(0.1, abs=0.01)
    # Data sets are resampled by themselves: every combination of their resamples is equally likely.
    both = (all_resamples(values[0])[:, None] + all_resamples(values[1])) / 2
    found = bootstrap(values, level=0.8, resamples=40_000)
    assert found.mean == pytest.approx((values[0].mean() + values[1].mean()) / 2)
    assert np.mean(both < found.low) == pytest.approx(0.1, abs=0.01)
    assert np.mean(both > found.high) == pytest.approx(0.1, abs=0.01)


def test_an_interval_of_one_seed_and_many_queries_is_the_normal_one() -> None:
    values = np.random.default_rng(4).exponential(0.3, (1, 1_000))
    half = 1.959964 * values.std() / math.sqrt(1_000)
    found = bootstrap([values])
    assert found.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 10)
    assert found == bootstrap([values])
    # Seeds whose queries all agree differ in their level: queries add nothing.
    apart = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert (bootstrap([apart]).low, bootstrap([apart]).high) == pytest.approx((0.0, 1.0))


def test_packed_results_keep_three_digits() -> None:
    values = [0.0, 1.0, 1 / math.log2(3), 0.5, 0.2890648]
    assert unpack(pack(values)) == pytest.approx(values, abs=2.5e-4)
    assert len(pack([0.5] * 1_000)) < 2_700


def test_an_evaluation_keeps_ndcg_of_every_query(minilm: SentenceTransformer) -> None:
    pairs = [pair(number) for number in range(30)]
    pairs += [Pair(pairs[0].summary, "Another document that answers the same query, far away.", "z.py")]
    base = retrieval_evaluator(pairs, 12, seed=0)
    found = evaluation.evaluate(base, minilm)
    assert found["ndcg"] == base(minilm)["held-out_cosine_ndcg@10"]
    documents = minilm.encode(base.corpus)
    expected = []
    for query, text in zip(base.queries_ids, base.queries, strict=True):
        relevance = [[float(document in base.relevant_docs[query]) for document in base.corpus_ids]]
        expected.append(ndcg_score(relevance, minilm.similarity(minilm.encode(text), documents).numpy(), k=10))
    assert unpack(found["by_query"]) == pytest.approx(expected, abs=1e-3)


def run_record(by_query: list[float], negatives: int = 0, masked: int = 0, scored: int = 0) -> dict[str, Any]:
    return {
        "ndcg": sum(by_query) / len(by_query),
        "by_query": pack(by_query),
        "negatives": negatives,
        "masked": masked,
        "pairs_scored": scored,
        "anchors": 20,
    }


def test_gains_are_differences_within_a_seed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", "plan")
    for source in ("code", "docstrings"):
        for seed, plain, ours in (("0", 0.25, 0.5), ("1", 0.5, 0.625), ("2", 0.25, 0.375)):
            ledger.add(("run", "large", source, "no filter", seed), run_record([plain, plain]))
            served = run_record([ours, ours], 180, 18, 100)
            ledger.add(("run", "large", source, "cross-encoder, absolute 0", seed), served)
    # A contender with one seed is compared with the others' trainings of that seed.
    ledger.add(("run", "large", "code", "local guide, absolute 0", "1"), run_record([0.375, 0.375]))
    row = report.rows(ledger)["code", "large", "cross-encoder, absolute 0"]
    assert list(row.gain.values()) == [0.25, 0.125, 0.125]
    assert report.standard_error([0.04, 0.02, 0.03]) == pytest.approx(0.01 / math.sqrt(3))
    assert report.standard_error([0.5]) is None
    assert (row.masked, row.scored) == (0.1, 0.5)
    # A resample of three seeds has seed 0 three times with a probability of 1/27, which is above 2.5%.
    text = report.tables(ledger)
    gain = "+0.167 (+0.125 to +0.250)"
    assert f"| cross-encoder, absolute 0 | 3 | 0.500 | {gain} | +0.250 (+0.250 to +0.250) |  | 10.0% | 50.0% |" in text
    assert "| no filter | 3 | 0.333 |  | +0.125 (+0.125 to +0.125) |  |  |  |" in text
    assert "| large: mean of the data sets | above no filter | above local guide | above hardness |" in text
    # Both data sets: of the 27 * 27 pairs of resamples, 1.8% have seed 0 five times or more.
    assert "| cross-encoder, absolute 0 | +0.167 (+0.125 to +0.208) |  |  |" in text

    report.write_figures(tmp_path / "figures.json", ledger)
    by_name = {one["figure"]: one for one in json.loads((tmp_path / "figures.json").read_text())}
    figure = by_name["code; large; cross-encoder, absolute 0: nDCG@10 above no filter, 95% interval"]
    assert [figure[key] for key in ("value", "low", "high")] == pytest.approx([1 / 6, 0.125, 0.25])
    report.draw_gains(tmp_path / "gains.png", ledger)
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_guide_averages_raw_scores_on_the_cosines_scale() -> None:
    columns = texts(3, 4)
    queries, documents = columns[0], columns[1] + columns[2]
    scores = [random_scores(seed)(queries, documents) for seed in (1, 2)]
    logits = 7 * scores[1] - 3
    factor, shift = onto([scores[0]], [logits])
    assert (factor * logits + shift).mean() == pytest.approx(scores[0].mean(), abs=1e-6)
    assert (factor * logits + shift).std() == pytest.approx(scores[0].std())
    clients = [
        MemoryScorer(random_scores(1)),
        MemoryScorer(lambda asked, among: 7 * random_scores(2)(asked, among) - 3),
    ]
    members = [Member(clients[0], 48), Member(clients[1], 64, factor, shift)]
    guide = MeanScorer(members)
    expected = (scores[0] + factor * logits + shift) / 2
    job = guide.stream_grid(queries, documents, max_length=1, score_type="raw")
    assert job.rows(1, 4) == pytest.approx(expected[1:], abs=1e-6)
    places = np.array([2, 0]), np.array([5, 1])
    pairs = guide.stream_pairs(queries, documents, *places, max_length=1, score_type="raw")
    assert pairs.rows(0, 2)[:, 0] == pytest.approx(expected[places], abs=1e-6)
    assert [one.options["max_length"] for client in clients for one in client.jobs] == [48, 48, 64, 64]
    job.release(0, 2)
    job.cancel()
    assert all(client.jobs[0].cancelled and client.jobs[0].released == [(0, 2)] for client in clients)
    with pytest.raises(ValueError, match="score_type='raw', not 'probability'"):
        guide.stream_grid(queries, documents, score_type="probability")


def test_every_contender_has_a_name_of_its_own() -> None:
    names = [entrant.name for stage in FULL.stages for entrant in set(stage.entrants)]
    assert len({one for stage in FULL.stages for one in stage.entrants}) == len(set(names))
    assert Served("bi-encoder", None, distillation=Distillation(weight=2.0)).name == (
        "bi-encoder, no contrast + kl batch weight 2.0"
    )


def test_a_plans_stages_fit_its_regimes() -> None:
    for plan in (FULL, quick()):
        for stage in plan.stages:
            regime = plan.regime(stage.regime)
            assert set(stage.seeds) <= set(range(regime.seeds))
            assert set(stage.sources) <= set(plan.sources)
            assert len(set(stage.entrants)) == len(stage.entrants)
    assert all(regime.steps >= 60 for regime in FULL.regimes)
    seeds = [set(stage.seeds) for stage in FULL.stages if stage.table in ("screening", "hard negatives")]
    assert not seeds[0] & set.union(*seeds[1:])


def test_without_contrast_only_the_distillation_term_trains() -> None:
    columns = texts(3, 5)
    student = load_student(1).eval()
    settings = Served("bi-encoder", None, distillation=Distillation(weight=2.0, temperature=0.3))
    options = contenders.served_options(FULL, settings)
    loss = RerankerCachedGISTEmbedLoss(student, MemoryScorer(random_scores()), temperature=0.02, **options)
    anchors, *documents = (student(student.preprocess(column))["sentence_embedding"] for column in columns)
    logits = anchors @ torch.cat(documents).T / 0.02
    scores = random_scores()(columns[0], columns[1] + columns[2])
    guide = torch.softmax(torch.from_numpy(scores) / 0.3, dim=1)
    expected = 2.0 * (guide * (guide.log() - torch.log_softmax(logits, dim=1))).sum(1).mean()
    expected.backward()
    wanted = gradients(student)
    value, found = loss_and_gradients(loss, features(student, columns))
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_same_gradients(found, wanted, tolerance=1e-4)


def test_labels_are_the_guides_scores_of_each_anchors_own_documents(minilm: SentenceTransformer) -> None:
    rows = [(f"Query {number}.", f"Positive {number}.", f"Negative {number}.") for number in range(4)]
    table = {
        (row[0], text): row_number + column / 8
        for row_number, row in enumerate(rows)
        for column, text in enumerate(row)
    }

    def score_pairs(pairs: list[tuple[str, str]]) -> NDArray[np.float32]:
        return np.array([table[one] for one in pairs], dtype=np.float32)

    dataset = contenders.labelled(batches.for_seed([rows], 1, 0), score_pairs)
    assert dataset.column_names == ["anchor", "positive", "negative", "label"]
    assert dataset["label"][:] == [[row + 1 / 8, row + 2 / 8] for row in range(4)]


def test_distillation_over_own_documents_has_no_factor_of_the_temperature() -> None:
    columns = texts(3, 4)
    student = load_student(1).eval()
    labels = np.array([random_scores()([columns[0][row]], [columns[1][row], columns[2][row]])[0] for row in range(4)])
    made = contenders.own_documents("name", 0.02, labels)
    loss = made.make_loss(student)
    with torch.no_grad():
        found = float(loss(features(student, columns, raw=False), torch.from_numpy(labels)))
        anchors, *documents = (student(student.preprocess(column))["sentence_embedding"] for column in columns)
    logits = torch.stack([(anchors * column).sum(1) for column in documents], dim=1) / 0.02
    guide = torch.softmax(torch.from_numpy(labels) / loss.teacher_temperature, dim=1)
    expected = (guide * (guide.log() - torch.log_softmax(logits, dim=1))).sum(1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)
    # Of the largest possible entropy, the logarithm of 2, the guide's distributions have 0.3 in the mean.
    assert float(-(guide * guide.log()).sum(1).mean()) == pytest.approx(0.3 * math.log(2), rel=0.05)
    assert made.read_counts(loss).pairs_scored == 8


def test_a_plans_digest_changes_with_the_settings_that_results_depend_on() -> None:
    assert FULL.digest != replace(FULL, learning_rate=1.0).digest
    smaller = replace(FULL.regimes[0], steps=3)
    assert FULL.digest != replace(FULL, regimes=(smaller, *FULL.regimes[1:])).digest
    assert FULL.digest == replace(FULL, stages=FULL.stages[:1]).digest
    assert FULL.digest == FULL.on(["code"]).digest


def test_a_plan_can_be_kept_to_some_data_sets() -> None:
    assert {name for stage in FULL.on(["code"]).stages for name in stage.sources} == {"code"}
    assert len(FULL.on(["docstrings"]).stages) == len(FULL.stages) > len(FULL.on(["code"]).stages)
    assert FULL.on(["code"]).sources == FULL.sources  # the guides are trained on all data sets


@pytest.mark.usefixtures("forked_children")
def test_a_small_study_runs_from_texts_to_tables_and_a_second_run_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screening = quick().stages[0]
    entrants = (screening.entrants[0], *screening.entrants[2:4], screening.entrants[5], screening.entrants[7])
    plan = replace(quick(), stages=(replace(screening, entrants=entrants, measured=("bi-encoder",)), quick().stages[3]))
    said: list[str] = []
    Study(plan, tmp_path, "torch", said.append).run()
    ledger = (tmp_path / "quality" / "ledger.jsonl").read_text()
    found = Ledger(tmp_path / "quality" / "ledger.jsonl", plan.digest)
    runs = found.under("run")
    regime = plan.regime(screening.regime)
    assert len(runs) == len(entrants) + len(plan.stages[1].entrants) == 7
    assert all(0 < one["ndcg"] <= 1 for one in runs.values())
    assert all(unpack(one["by_query"]).mean() == pytest.approx(one["ndcg"], abs=3e-4) for one in runs.values())
    # The local guide's filter and the measured filters of the served guide count the same pairs.
    local = runs["screening", "code", "local guide, absolute 0", "0"]
    assert local["pairs_scored"] == regime.steps * regime.batch_size * 2 * regime.batch_size
    measured = found.under("filter", "code", regime.name, "bi-encoder")
    sizes = {one["known_copies"] + one["known_others"] + one["unknown"] for one in measured.values()}
    assert sizes == {plan.measured_batches * regime.batch_size * (2 * regime.batch_size - 1)}
    assert any("code: mean by itself" in line for line in said)
    assert all(
        (tmp_path / name).stat().st_size > 0
        for name in ("quality.json", "quality.md", "quality.png", "quality-margins.png")
    )
    for log in ("bi-encoder.log", "tuned bi-encoder.log", "cross-encoder.log"):
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
        parse(["--stages", "nothing"])
    assert caught.value.code == 2
    assert "--stages" in capsys.readouterr().err
    named = list(dict.fromkeys(stage.name for stage in FULL.stages))
    assert parse(["--stages", *named]).stages == named


def test_every_stage_of_the_plan_can_be_chosen_on_the_command_line() -> None:
    names = list(dict.fromkeys(stage.name for stage in FULL.stages))
    assert parse(["--stages", *names]).stages == names
