"""The loss with preselected pairs and with a limit of its waiting."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from loss_client import RerankerClient
from loss_client.callbacks import _metrics
from loss_client.client.errors import RerankerUnavailableError
from loss_client.filter.distillation import Distillation
from loss_client.filter.nearest import nearest
from loss_client.loss import RerankerCachedGISTEmbedLoss

from . import losses
from .losses import CONTRAST
from .stub_server import Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores
from .training import (
    MemoryScorer,
    MemoryScores,
    assert_same_gradients,
    cosines_of,
    features,
    guide,
    loss_and_gradients,
    random_scores,
    texts,
)

WAIT_SECONDS = 20.0
EVERY = 10_000
"""More pairs an anchor than any batch here has."""


def embed(batch: Sequence[str]) -> NDArray[np.float64]:
    """Embed texts at random, equal texts alike."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in batch])


def make(model: Any, scorer: Any, **options: Any) -> RerankerCachedGISTEmbedLoss:
    preselector = {"preselector": embed} if options.get("candidates") == "nearest" else {}
    return losses.make(model, scorer, **{"mini_batch_size": 5, **preselector, **options})


def repeated() -> list[list[str]]:
    """Return columns with texts that repeat within and across them."""
    anchors, positives, negatives = texts(3, 12)
    return [
        [*anchors[:11], anchors[2]],
        [*positives[:10], positives[1], positives[11]],
        [positives[4], *negatives[1:]],
    ]


@pytest.mark.parametrize("contrast", CONTRAST)
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.6), ("relative", -0.3)])
def test_with_every_pair_chosen_it_is_the_full_loss(
    model: SentenceTransformer, contrast: dict[str, Any], strategy: str, margin: float
) -> None:
    options = {**contrast, "margin_strategy": strategy, "margin": margin}
    batch = features(model, repeated())
    full = make(model, MemoryScorer(random_scores()), **options)
    expected = loss_and_gradients(full, batch)
    few = make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=EVERY, **options)
    found = loss_and_gradients(few, batch)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    for name in ("masked_negatives", "negatives", "outscored_positives", "scored_negatives"):
        assert getattr(few.statistics, name) == getattr(full.statistics, name)
    assert few.statistics.unscored_fraction == pytest.approx(0, abs=1e-12)
    assert few.statistics.missed_masks == 0
    assert few.statistics.rounds == 2


def test_distillation_reads_the_scored_documents(model: SentenceTransformer) -> None:
    options = {"distillation": Distillation(temperature=0.1), "margin": 0.3}
    batch = features(model, repeated())
    expected = loss_and_gradients(make(model, MemoryScorer(random_scores()), **options), batch)
    few = make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=EVERY, **options)
    found = loss_and_gradients(few, batch)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    some = make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=2, **options)
    some(batch, None)
    assert some.statistics.distilled_anchors == 12


def test_a_preselector_that_is_the_reranker_finds_every_mask(model: SentenceTransformer, directory: Path) -> None:
    judge, columns = guide(directory), texts(2, 24)
    full = make(model, MemoryScorer(cosines_of(judge)))
    full(features(model, columns), None)
    masks = full.statistics.masked_negatives
    assert 24 < masks < 24 * 22  # not few, and not nearly all
    # As many pairs as there are masks are enough, however they are spread over the rows.
    few = make(
        model, MemoryScorer(cosines_of(judge)), candidates="nearest", preselector=judge, per_anchor=(masks + 2) / 24
    )
    few(features(model, columns), None)
    assert masks - 2 <= few.statistics.masked_negatives <= masks
    assert few.statistics.pairs == 24 + masks + 2
    assert few.statistics.skipped_pairs == 24 * 24 - few.statistics.pairs


def test_metrics_name_the_pairs_and_what_is_missed(model: SentenceTransformer) -> None:
    loss = make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=3)
    for _ in range(10):
        loss(features(model, texts(2, 12)), None)
    entry, counts = _metrics(loss.statistics), loss.statistics
    assert entry["reranker/per_anchor"] == 3
    assert entry["reranker/pairs"] == 12 * 4
    assert counts.probed_pairs == 8 * 10
    # By brute force: the masks of all pairs, less those that were found.
    full = make(model, MemoryScorer(random_scores()))
    full(features(model, texts(2, 12)), None)
    masks = full.statistics.masked_negatives
    missed = 1 - counts.masked_negatives / 10 / masks
    assert entry["reranker/missed_mask_fraction"] == pytest.approx(missed, abs=0.2)
    assert not {"reranker/late_pairs", "reranker/late_choices", "reranker/unscored_anchor_fraction"} & entry.keys()


def test_what_top_p_alone_misses_is_estimated(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "DRAWN", 40)
    batch = features(model, texts(2, 12))
    full = make(model, MemoryScorer(random_scores()))
    full(batch, None)
    loss = make(model, MemoryScorer(random_scores()), candidates="nearest", preselector=None, top_p=0.3)
    for _ in range(10):
        loss(batch, None)
    counts = loss.statistics
    missed = full.statistics.masked_negatives - counts.masked_negatives / 10
    assert missed > 10
    assert counts.missed_masks / 10 == pytest.approx(missed, rel=0.2)
    assert counts.probed_pairs == 40 * 10
    assert counts.preselected_pairs == 0


@pytest.mark.parametrize("contrast", CONTRAST[::3])
def test_rows_with_less_than_top_p_are_topped_up(model: SentenceTransformer, contrast: dict[str, Any]) -> None:
    batch, epsilon = features(model, texts(3, 12)), 0.05
    expected = float(make(model, MemoryScorer(random_scores()), **contrast)(batch, None).detach())
    few = make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=2, top_p=1 - epsilon, **contrast)
    found = float(few(batch, None).detach())
    assert -1e-5 <= found - expected <= -math.log1p(-epsilon) + 1e-5
    assert few.statistics.unscored_fraction <= epsilon * 12 * (1 + 1e-6)
    assert few.statistics.capped_anchors == 0


def test_matryoshka_reads_the_pairs_once(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    inner = make(model, scorer, candidates="nearest", per_anchor=2)
    MatryoshkaLoss(model, inner, [32, 16, 8])(features(model, texts(3, 8)), None)
    assert len(scorer.jobs) == 2
    assert inner.statistics.preselected_pairs == 16


# Errors


def test_nearest_needs_a_preselector(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"needs a preselector.*SentenceTransformer\('sentence-transformers/"):
        make(model, MemoryScorer(random_scores()), candidates="nearest", preselector=None)
    for wrong in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"top_p must be between 0 and 1, such as 0\.999"):
            make(model, MemoryScorer(random_scores()), candidates="nearest", top_p=wrong)
    with pytest.raises(ValueError, match="preselector is the model that is trained"):
        make(model, MemoryScorer(random_scores()), candidates="nearest", preselector=model)
    for wrong in (0, -1.0, "some"):
        with pytest.raises(ValueError, match="per_anchor must be 'auto' or greater than 0"):
            make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=wrong)


def test_a_fault_of_the_preselector_ends_the_step(model: SentenceTransformer) -> None:
    def broken(batch: Sequence[str]) -> NDArray[np.float64]:
        raise KeyError("no such text")

    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, candidates="nearest", per_anchor=2, preselector=broken, on_error="unfiltered")
    with pytest.raises(KeyError, match="no such text"):
        loss(features(model, texts(2, 6)), None)
    assert scorer.jobs[0].cancelled


def test_a_preselector_without_a_server_is_an_error_of_the_scores(model: SentenceTransformer) -> None:
    gone = MemoryScorer(random_scores(), RerankerUnavailableError("nobody there"))
    options = {"candidates": "nearest", "per_anchor": 2, "preselector": gone}
    with pytest.raises(RerankerUnavailableError, match="nobody there"):
        make(model, MemoryScorer(random_scores()), **options)(features(model, texts(2, 6)), None)
    loss = make(model, MemoryScorer(random_scores()), on_error="unfiltered", **options)
    loss(features(model, texts(2, 6)), None)
    assert loss.statistics.unfiltered_steps == 1


def test_a_served_preselector_chooses_by_its_raw_scores(model: SentenceTransformer) -> None:
    columns, served = texts(2, 8), MemoryScorer(random_scores(3))
    scorer = MemoryScorer(random_scores())
    make(model, scorer, candidates="nearest", per_anchor=1, preselector=served)(features(model, columns), None)
    assert [job.options["score_type"] for job in served.jobs] == ["raw"]
    similar = random_scores(3)(*columns)
    leads = similar - similar.diagonal()[:, None]
    np.fill_diagonal(leads, -np.inf)
    best = {(columns[0][place // 8], columns[1][place % 8]) for place in np.argsort(-leads.reshape(-1))[:8]}
    asked = list(zip(scorer.jobs[1].queries, scorer.jobs[1].documents, strict=True))
    assert best == set(asked[:8])


def test_a_cancelled_step_chooses_no_more(model: SentenceTransformer) -> None:
    gate, entered, scorer = threading.Event(), threading.Event(), MemoryScorer(random_scores())

    def slow(batch: Sequence[str]) -> NDArray[np.float64]:
        entered.set()
        gate.wait(WAIT_SECONDS)
        return embed(batch)

    loss = make(model, scorer, candidates="nearest", per_anchor=2, preselector=slow)
    first, second = loss.begin(texts(2, 6)), loss.begin(texts(2, 6))
    assert entered.wait(WAIT_SECONDS)
    first.cancel()
    second.cancel()
    gate.set()
    loss(features(model, texts(2, 6)), None)  # the thread goes on with the next batch
    assert [job.cancelled for job in scorer.jobs] == [True, True, False, False]
    assert first.failed()
    assert second.failed()


def test_a_copy_of_the_loss_chooses_by_itself(model: SentenceTransformer) -> None:
    loss = make(model, MemoryScorer(random_scores()), candidates="nearest", per_anchor=2)
    loss(features(model, texts(2, 6)), None)
    other = copy.deepcopy(loss)
    other(features(other.model, texts(2, 6)), None)
    assert other.statistics.preselected_pairs == 2 * loss.statistics.preselected_pairs == 24
    assert not any("preselector" in name for name, _ in loss.named_parameters())


# Late scores


@dataclass
class LateScores(MemoryScores):
    """A job of which only some scores arrive: those of even rows and columns, or none."""

    none: bool = False

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        found = self.rows(begin, end).copy()
        rows, columns = np.arange(begin, end), np.arange(found.shape[1])
        missing = (rows[:, None] + columns) % 2 == 1
        found[missing | self.none] = np.nan
        return found


class LateScorer(MemoryScorer):
    """Answers half of each job in time, or nothing of it.

    Attributes:
        none: Whether nothing arrives in time; by the number of the job.
    """

    def __init__(self, none: Sequence[bool] = ()) -> None:
        super().__init__(random_scores())
        self.none = list(none)

    def _late(self, job: MemoryScores) -> LateScores:
        none = len(self.jobs) <= len(self.none) and self.none[len(self.jobs) - 1]
        late = LateScores(job.queries, job.documents, job.options, job.values, none=none)
        self.jobs[-1] = late
        return late

    def stream_grid(self, *texts: Any, **options: Any) -> LateScores:
        return self._late(super().stream_grid(*texts, **options))

    def stream_pairs(self, *texts: Any, **options: Any) -> LateScores:
        return self._late(super().stream_pairs(*texts, **options))


@pytest.mark.parametrize("candidates", ["all", "top_p", "nearest"])
@pytest.mark.parametrize("distilled", [False, True])
def test_what_has_not_arrived_in_time_stays_a_negative(
    model: SentenceTransformer, candidates: str, distilled: bool
) -> None:
    columns, scorer = texts(2, 8), LateScorer()
    options: dict[str, Any] = {"per_anchor": EVERY} if candidates == "nearest" else {}
    if candidates == "top_p":
        options = {"candidates": "nearest", "preselector": None, "top_p": 0.999}
    distillation = Distillation(temperature=0.1) if distilled else None
    loss = make(model, scorer, **{"candidates": candidates, **options}, max_wait=5.0, distillation=distillation)
    step = loss.begin(columns)
    step.settle(loss._settings())
    logits = np.zeros((8, 8), np.float32)
    step.select(8, lambda begin, end: torch.from_numpy(logits[begin:end]))
    mask = step.mask(0, 8)
    step.observe(0, 8, torch.from_numpy(logits))
    counts = step.statistics()
    # By brute force, from what the jobs answered.
    scores = np.full((8, 8), np.nan, np.float32)
    for number, job in enumerate(scorer.jobs):
        job.released.clear()
        found = job.arrived(0, len(job.values), 0)
        if found.shape[1] > 1:
            scores = found
            continue
        random = 8 if candidates != "all" and number == 1 else 0  # pairs at the end, for the estimate alone
        for query, document, score in list(zip(job.queries, job.documents, found[:, 0], strict=True))[
            : -random or None
        ]:
            place = columns[0].index(query), columns[1].index(document)
            scores[place] = score if np.isnan(scores[place]) else scores[place]
    own = scores.diagonal()
    expected = (scores > own[:, None]) & ~np.eye(8, dtype=bool)
    np.testing.assert_array_equal(mask, expected)
    assert counts.late_pairs > 0
    assert counts.scored_anchors == int((~np.isnan(own)).sum()) > 0
    assert counts.masked_negatives == expected.sum()
    undecided = np.isnan(scores)[~np.isnan(own)].sum(1)
    left = (~mask).sum(1)[~np.isnan(own)]
    assert counts.unscored_fraction == pytest.approx(float((undecided / left).sum()))
    assert all(job.cancelled for job in scorer.jobs)
    assert counts.unfiltered_steps == 0
    if distilled:
        found = step.targets(0, 8).scores
        assert np.isnan(found).sum() == np.isnan(scores).sum()


@pytest.mark.parametrize("candidates", ["all", "nearest"])
def test_a_step_without_any_score_in_time_is_counted_and_warned_of(
    model: SentenceTransformer, candidates: str, caplog: pytest.LogCaptureFixture
) -> None:
    loss = make(model, LateScorer([True] * 9), candidates=candidates, max_wait=0.5, per_anchor=2)
    found = loss_and_gradients(loss, features(model, texts(2, 6)))
    nothing = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    expected = loss_and_gradients(make(model, nothing), features(model, texts(2, 6)))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert loss.statistics.unfiltered_steps == 1
    assert "scored within 0.5 s (max_wait)" in caplog.text


def test_auto_never_waits_for_preselected_pairs(model: SentenceTransformer) -> None:
    gate, scorer = threading.Event(), LateScorer([False, False, True])

    def slow(batch: Sequence[str]) -> NDArray[np.float64]:
        gate.wait(WAIT_SECONDS)
        return embed(batch)

    loss = make(model, scorer, candidates="nearest", preselector=slow)
    # Its scores of own documents are waited for, without a limit.
    loss(features(model, texts(2, 6)), None)
    assert loss.statistics.late_choices == 1
    assert loss.statistics.scored_anchors == 6
    assert len(scorer.jobs) == 1
    gate.set()
    step: Any = loss.begin(texts(2, 6))
    step._preselections[0]._future.result(WAIT_SECONDS)
    step.settle(loss._settings())
    step.select(6, lambda begin, end: pytest.fail("no logits are needed"))
    step.observe(0, 6, torch.zeros(6, 6))
    counts = step.statistics()
    assert 4 * 6 <= counts.late_pairs <= 4 * 6 + 8  # four an anchor, and random ones
    assert counts.unfiltered_steps == 0


# Over gRPC


def test_a_server_that_stops_in_the_middle_holds_a_step_no_longer_than_max_wait(model: SentenceTransformer) -> None:
    gate = Gate()

    async def some(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if chunk.number >= 4:
            await gate.wait()

    columns = texts(2, 8)
    with StubServer(on_chunk=some) as server, RerankerClient(server.target) as client:
        loss = make(model, client, max_wait=1.0, chunk_pairs=8)
        loss(features(model, columns), None)
        counts = loss.statistics
        assert counts.scored_anchors == 4
        assert counts.late_pairs == 32
        assert 0.9 <= counts.wait_seconds < 5
        scores = hash_scores(columns[0], columns[1])[:4]
        above = (scores > scores.diagonal()[:, None]).sum()
        assert counts.masked_negatives == above > 0
        assert counts.unfiltered_steps == 0
        server.wait_for(lambda: server.streams[0].ended, "the end of the job")
        gate.open()


def test_the_pairs_with_the_largest_leads_arrive_first(model: SentenceTransformer) -> None:
    gate = Gate()

    async def first_band(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if chunk.number >= 2:  # the anchors' own documents have two chunks
            await gate.wait()

    columns, served = texts(2, 8), MemoryScorer(random_scores(3))
    with StubServer(on_chunk=first_band) as server, RerankerClient(server.target) as client:
        loss = make(model, client, candidates="nearest", preselector=served, per_anchor=4, max_wait=1.0, chunk_pairs=4)
        step: Any = loss.begin(columns)
        preselected = server.wait_for(
            lambda: next((stream for stream in server.streams if len(stream.chunks) > 2), None), "preselected pairs"
        )
        step.settle(loss._settings())
        step.select(8, lambda begin, end: pytest.fail("no logits are needed"))
        step.observe(0, 8, torch.zeros(8, 8))
        counts = step.statistics()
        assert counts.preselected_pairs == 32
        similar = random_scores(3)(*columns)
        leads = similar - similar.diagonal()[:, None]
        np.fill_diagonal(leads, -np.inf)
        best = {(columns[0][place // 8], columns[1][place % 8]) for place in np.argsort(-leads.reshape(-1))[:8]}
        # The first of four bands: the eight best pairs, and eight random ones, of which some are among the best.
        asked = [pair for chunk in preselected.chunks for pair in chunk.pairs()]
        assert best <= set(asked[:16])
        assert 0 < counts.pairs - 8 <= 8
        assert 24 <= counts.late_pairs <= 32
        gate.open()
