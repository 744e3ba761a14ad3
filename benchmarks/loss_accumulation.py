"""Benchmark of gradient accumulation: time of a batch over the longer of training alone and scoring alone.

The trainer collates all batches of a step at once, so that their jobs begin together. They are served in the order of
the batches. For comparison, the same training runs with a client whose jobs have no order.

The model sleeps for most of the time that a batch takes, a third of it in the pass without gradients. Client and server
thus have the processor as they would beside a GPU, and other work on the machine changes the figures little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.bench import Bench
from benchmarks.loss_prefetch import TARGET, Training, training_beside_server
from benchmarks.report import Figure
from benchmarks.rounds import Spread
from loss_client import RerankerClient

ACCUMULATIONS = (1, 2, 4, 8, 16)
_QUICK_ACCUMULATIONS = (1, 4)
# Batches that are measured: a whole number of steps, two or more of each accumulation but the last.
_BATCHES = 16
_QUICK_BATCHES = 4
_BATCH = 16
_ROUNDS = 2
# Sleep of one forward pass of a column. A batch has two columns; a pass with gradients, which stands for a forward and
# a backward pass, sleeps twice as long: 0.3 s in all.
_PASS_SECONDS = 0.05
_QUICK_PASS_SECONDS = 0.01


class Unordered:
    """Methods of a client whose jobs all begin at once; see ``ScoringClient``."""

    def __init__(self, client: RerankerClient) -> None:
        self.stream_grid = client.stream_grid
        self.stream_pairs = client.stream_pairs
        self.raw_scale = client.raw_scale


@dataclass(frozen=True, slots=True)
class Round:
    """Measurements for one accumulation in one round, taken one right after the other.

    Attributes:
        alone: Seconds a batch of training without a reranker, whose accumulation has no influence on it.
        score: Seconds to score one batch while no training runs.
        ordered: Seconds a batch with the client's jobs in order.
        unordered: Seconds a batch with jobs that all begin at once.
    """

    alone: float
    score: float
    ordered: float
    unordered: float

    @property
    def bound(self) -> float:
        """Lower bound of the mean time of a batch, in seconds."""
        return max(self.alone, self.score)


def accumulation_figures(bench: Bench) -> list[Figure]:
    """Measure the time of a batch for each number of batches a step, where scoring takes as long as training.

    Args:
        bench: The run.
    """
    quick = bench.scale < 1
    accumulations, batches = (_QUICK_ACCUMULATIONS, _QUICK_BATCHES) if quick else (ACCUMULATIONS, _BATCHES)
    found: dict[int, list[Round]] = {accumulation: [] for accumulation in accumulations}
    # The first step is not measured. The last batch has a next one.
    with training_beside_server(bench, _BATCH, batches + max(accumulations) + 1) as training:
        seconds = _QUICK_PASS_SECONDS if quick else _PASS_SECONDS
        sleep_in_passes(training.model, seconds)
        for mode in ("prefetch", "alone"):  # the first training is a warm-up
            usual = training.run(mode, 4).seconds
        training.set_rate(_BATCH * _BATCH / usual)
        for number in range(min(bench.rounds, _ROUNDS)):
            alone = training.run("alone", batches // 2).seconds
            for accumulation in accumulations:
                one = _measure(training, accumulation, batches, alone)
                found[accumulation].append(one)
                bench.say(
                    f"round {number + 1}, {accumulation} batches a step: train {one.alone:.3f} s, score "
                    f"{one.score:.3f} s; {one.ordered:.3f} s a batch in order, {one.unordered:.3f} s without an order"
                )
    return list(figures(found))


def sleep_in_passes(model: nn.Module, seconds: float) -> None:
    """Let a model sleep in each forward pass, twice as long with gradients, in place of a backward pass."""
    model.register_forward_hook(lambda *_: time.sleep(seconds * (1 + torch.is_grad_enabled())))


def _measure(training: Training, accumulation: int, batches: int, alone: float) -> Round:
    steps = max(batches // accumulation, 1)
    ordered, unordered = (
        training.run("prefetch", steps, skipped=1, accumulation=accumulation, client=client).seconds / accumulation
        for client in (training.client, Unordered(training.client))
    )
    return Round(alone, training.score_seconds(), ordered, unordered)


def figures(found: Mapping[int, Sequence[Round]]) -> Iterator[Figure]:
    """Yield the figures.

    Args:
        found: All rounds of each accumulation.
    """
    for accumulation, rounds in found.items():
        name = f"{accumulation} batches a step: batch / max(train, score)"
        yield Figure(name, Spread.of([one.ordered / one.bound for one in rounds]), "x", TARGET, False)
        without = Spread.of([one.unordered / one.bound for one in rounds])
        yield Figure(f"{name}, jobs without an order", without, higher_is_better=False)
