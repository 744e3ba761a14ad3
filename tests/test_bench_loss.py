"""Tests of the loss benchmark: the engine of fixed speed, the clock, the comparisons, and a small real run."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn import functional

from benchmarks import loss_accumulation, loss_candidates
from benchmarks.loss import run
from benchmarks.loss_candidates import Calculation, Comparison, Guide, calculate
from benchmarks.loss_pace import FixedSpeedEngine, write_rate
from benchmarks.loss_prefetch import Round, StepClock, Steps, figures
from benchmarks.servers import RATE, Changes, Curve
from benchmarks.servers import draw as draw_servers
from benchmarks.servers import figures as server_figures
from chaos.ledger import Ledger
from loss_client import RerankerCachedGISTEmbedLoss, RerankerClient
from loss_client.filter.jobs import OneModelClient, ScoringClient

from .training import student


def test_pairs_are_finished_one_after_the_other_at_the_current_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("benchmarks.loss_pace.asyncio.sleep", sleep)
    rate = tmp_path / "rate"
    write_rate(rate, 0.01)  # so slow that the duration of this test is negligible
    engine = FixedSpeedEngine(rate)

    async def work() -> list[Any]:
        found = [await engine.run([None] * 10), await engine.run([None] * 20)]  # type: ignore[list-item]
        write_rate(rate, 0.1)
        return [*found, await engine.run([None] * 10)]  # type: ignore[list-item]

    scores = asyncio.run(work())
    assert [len(one) for one in scores] == [10, 20, 10]
    assert slept == pytest.approx([1_000, 3_000, 3_100], abs=60)


def test_the_clock_counts_from_step_to_step_and_from_forward_to_embeddings() -> None:
    ticks = count()
    clock = StepClock(skipped=2, clock=lambda: float(next(ticks)))

    class Loss(nn.Module):
        def forward(self, value: int) -> int:
            return self.calculate_loss(value)

        def calculate_loss(self, value: int) -> int:
            return value + 1

    loss = Loss()
    clock.watch(loss)
    for step in range(4):
        assert loss(step) == step + 1
        if step == 3:
            next(ticks)  # the last step takes one second more
        clock.on_step_end(None, None, None)  # type: ignore[arg-type]
    # The clock is read three times a step; the first two readings are a second apart.
    assert clock.steps() == Steps(seconds=3.5, embedding=1.0)


@pytest.mark.parametrize(("score", "bound", "predicted"), [(0.2, 1.0, 1.0), (0.5, 1.0, 1.1), (3.0, 3.0, 3.6)])
def test_without_prefetch_scoring_overlaps_with_the_embedding_pass_alone(
    score: float, bound: float, predicted: float
) -> None:
    one = Round(Steps(1.0, 0.4), score, prefetch=1.0, without=1.0)
    assert (one.bound, one.predicted) == pytest.approx((bound, predicted))


def test_figures_are_taken_within_each_round() -> None:
    rounds = [
        Round(Steps(1.0, 0.25), 2.0, prefetch=2.2, without=2.75),
        Round(Steps(2.0, 0.5), 4.0, prefetch=4.0, without=6.05),  # a round at half the machine's speed
    ]
    by_name = {figure.name: figure for figure in figures({2.0: rounds}, [1.0, 1.01])}
    with_prefetch = by_name["prefetch, score/train 2: step / max(train, score)"]
    assert (with_prefetch.spread.low, with_prefetch.spread.high) == pytest.approx((1.0, 1.1))
    assert (with_prefetch.target, with_prefetch.reached) == (1.05, True)
    without = by_name["no prefetch, score/train 2: step / predicted"]
    assert (without.spread.low, without.spread.high) == pytest.approx((1.0, 1.1))
    assert by_name["train alone: embedding pass / step"].spread.value == pytest.approx(0.25)


def test_a_batch_in_order_has_a_target_and_one_without_an_order_has_none() -> None:
    rounds = [loss_accumulation.Round(alone=1.0, score=0.9, ordered=1.03, unordered=1.5)]
    ordered, unordered = loss_accumulation.figures({4: rounds})
    assert (ordered.name, ordered.target) == ("4 batches a step: batch / max(train, score)", 1.05)
    assert (ordered.spread.value, unordered.spread.value) == pytest.approx((1.03, 1.5))
    assert unordered.reached is None


def test_the_client_without_an_order_is_one_that_the_loss_takes() -> None:
    with RerankerClient("localhost:1") as client:
        plain: Any = loss_accumulation.Unordered(client)
        assert isinstance(plain, ScoringClient)
        assert not isinstance(plain, OneModelClient)


def unit_vectors(texts: list[str], seed: int) -> dict[str, torch.Tensor]:
    values = torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(seed))
    return dict(zip(texts, functional.normalize(values, dim=1), strict=True))


COLUMNS = [[f"anchor {row}" for row in range(24)], [f"positive {row}" for row in range(24)]]
TEXTS = [text for column in COLUMNS for text in column]


def test_the_guide_gives_a_pair_the_same_score_in_a_grid_and_in_a_list() -> None:
    vectors = unit_vectors(TEXTS, 0)
    guide = Guide(vectors)
    grid = guide.stream_grid(COLUMNS[0], COLUMNS[1]).rows(0, 24)
    assert grid[3, 5] == pytest.approx(float(vectors["anchor 3"] @ vectors["positive 5"]), abs=1e-6)
    rows, columns = np.array([3, 0, 23]), np.array([5, 0, 1])
    pairs = guide.stream_pairs(COLUMNS[0], COLUMNS[1], rows, columns)
    assert pairs.shape == (3, 1)
    assert pairs.rows(0, 3)[:, 0] == pytest.approx(grid[rows, columns], abs=1e-6)
    assert guide.seconds > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return student(tmp_path_factory.mktemp("models"))


def calculation(
    model: SentenceTransformer, candidates: Any, top_p: float = 0.999
) -> tuple[Calculation, list[torch.Tensor], Guide]:
    guide = Guide(unit_vectors(TEXTS, 0))
    embeddings = [torch.randn(24, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    loss = RerankerCachedGISTEmbedLoss(model, guide, 0.05, 5, score_type="raw", candidates=candidates, top_p=top_p)
    return calculate(loss, guide, COLUMNS, embeddings), embeddings, guide


def test_a_calculation_is_the_loss_and_its_gradients(model: SentenceTransformer) -> None:
    found, embeddings, guide = calculation(model, "all")
    scores = torch.from_numpy(guide.stream_grid(*COLUMNS).rows(0, 24))
    leaves = [one.clone().requires_grad_() for one in embeddings]
    logits = functional.normalize(leaves[0], dim=1) @ functional.normalize(leaves[1], dim=1).T / 0.05
    expected = functional.cross_entropy(
        logits.masked_fill(scores > scores.diag()[:, None], -torch.inf), torch.arange(24)
    )
    gradients = torch.autograd.grad(expected, leaves)
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(found.gradients, torch.stack(gradients), atol=1e-6)
    assert found.statistics.pairs == 24 * 24


def test_candidates_are_compared_with_all_pairs(model: SentenceTransformer) -> None:
    full = calculation(model, "all")[0]
    same = Comparison.of(full, full)
    assert (same.share, same.rounds, same.loss, same.gradient, same.seconds) == (1.0, 1, 0.0, 0.0, 1.0)
    some = Comparison.of(calculation(model, "nearest", top_p=0.8)[0], full)
    assert 24 / 24**2 < some.share < 1
    assert some.rounds <= 10
    assert 0 < some.loss <= -math.log(1 - 0.2)
    assert 0 < some.gradient < 1


def test_targets_that_are_bounds_are_compared_with_the_worst_batch() -> None:
    good = Comparison(share=0.01, rounds=2, loss=0.0, gradient=0.1, seconds=1.0)
    bad = Comparison(share=0.02, rounds=4, loss=0.5, gradient=0.2, seconds=2.0)
    found = {("minilm", 1024, 0.01): [good, good, bad]}
    by_name = {figure.name.partition(": ")[2]: figure for figure in loss_candidates.figures(found)}
    assert by_name["rounds"].spread.high == 4
    assert (by_name["time / with all pairs"].target, by_name["time / with all pairs"].reached) == (2.0, True)
    assert by_name["loss - full loss"].reached is False
    assert by_name["pairs scored"].reached is True
    assert by_name["pairs scored"].spread.high == 0.02


@pytest.mark.usefixtures("forked_children")
def test_a_small_run_measures_draws_and_writes(tmp_path: Path) -> None:
    parts = ["prefetch", "auto", "candidates", "curve", "cost"]
    figures = run(parts, output=tmp_path, rounds=1, scale=0.1, console=Console(quiet=True))
    by_name = {figure.name: figure for figure in figures}
    for ratio in ("0.5", "2"):
        assert by_name[f"prefetch, score/train {ratio}: step / max(train, score)"].spread.value > 0
        assert by_name[f"no prefetch, score/train {ratio}: step / predicted"].target == 1.05
    # The engine sleeps until pairs are finished, so it is never early.
    assert by_name["score alone: measured / intended"].spread.low > 0.9
    assert by_name["minilm, batch 64, T 0.05: loss - full loss"].reached
    assert by_name["student, batch 64, T 0.01: rounds"].spread.value <= 10
    assert by_name["batch 32, 2 columns, all: processor time a pair"].target == 1.0
    assert by_name["batch 32, 2 columns, nearest: step / without a reranker"].spread.value > 0
    assert len(json.loads((tmp_path / "loss.json").read_text())) == len(figures)
    assert by_name["auto, score all/train 64: step / max(train, own documents)"].spread.value > 0.9
    share = by_name["random, margin 0.05, nearest by minilm: masks found with 2 pairs a mask"].spread.value
    assert 0.5 < share <= 1
    for plot in ("loss-prefetch.svg", "loss-candidates.svg", "loss-curve.svg"):
        assert "</svg>" in (tmp_path / plot).read_text()


def test_the_speed_of_a_job_is_reached_when_the_pairs_of_the_next_second_say_so() -> None:
    times = np.arange(0.0, 10.0, 0.05)
    pairs = np.where(times < 5, 100 * times, 500 + 200 * (times - 5))  # twice as fast after 5 s
    curve = Curve(times, pairs)
    assert curve.rate(1.0, 2.0) == pytest.approx(100)
    assert curve.seconds_until(90, 1.0, 9.0) == 0
    assert curve.seconds_until(180, 4.0, 9.0) == pytest.approx(0.8, abs=0.06)
    assert curve.seconds_until(500, 4.0, 9.0) == pytest.approx(4.0, abs=0.06)


def test_figures_of_servers_name_their_targets(tmp_path: Path) -> None:
    curve = Curve(np.arange(0.0, 12.0, 0.05), 3 * RATE * np.arange(0.0, 12.0, 0.05))
    changes = [Changes(curve, killed=4.0, added=8.0)]
    shares = {1: [1.0, 1.0], 2: [0.97, 0.99]}
    found = list(server_figures(shares, [0.9], changes, Ledger(asked=10, missing=1)))
    assert [figure.reached for figure in found] == [True, False, True, True, None]
    assert found[-1].spread.value == 1
    draw_servers(tmp_path / "servers.svg", shares, changes[0])
    assert "<svg" in (tmp_path / "servers.svg").read_text()
