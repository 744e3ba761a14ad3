"""Sides in turn: each round gives every side the same pairs, one after the other, and a figure is a ratio of rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.texts import Grid

DOCUMENTS = 64
"""Documents of a grid: what HTTP services get in one request."""
_MOST_QUERIES = 64
_LEAST_QUERIES = 1


class Side(Protocol):
    """One way to get scores. ``name`` is what the table calls it."""

    name: str

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """Score a grid; gives the seconds that it took and the raw scores, shape ``(Q, D)``."""

    def pause(self) -> None:
        """Take no processor time until ``resume``."""

    def resume(self) -> None:
        """Be ready to score."""


class DisagreementError(RuntimeError):
    """Two sides gave different scores for the same pairs: then their speeds mean nothing."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several rounds: median, least and greatest."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value a round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Contest:
    """What came of a comparison.

    Attributes:
        queries: Queries of the grid, round by round.
        rates: By side, pairs a second in each round.
        difference: Largest difference between raw scores of two sides.
    """

    queries: list[int]
    rates: dict[str, list[float]]
    difference: float

    def ratio(self, side: str, other: str) -> Spread:
        """How many times as fast ``side`` is as ``other``, round by round."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates[side], self.rates[other], strict=True)])

    def rate(self, side: str) -> Spread:
        """Pairs a second of one side."""
        return Spread.of(self.rates[side])


def contest(
    sides: Sequence[Side],
    make_grid: Callable[[int], Grid],
    *,
    rounds: int,
    seconds: float,
    tolerance: float = 0.02,
    say: Callable[[str], object] = lambda _: None,
) -> Contest:
    """Let sides score the same grids in turn: A B C A B C ...

    Args:
        sides: Who competes; all are paused but the one whose turn it is.
        make_grid: Gives a fresh grid with so many queries.
        rounds: How many rounds, after one to warm up and to find out how long a round takes; every round is made as
            long as those before it leave time for, so that a machine that changes its speed changes their size.
        seconds: What all rounds together should take.
        tolerance: Largest difference between raw scores that still counts as the same.
        say: Is told what is going on.

    Raises:
        DisagreementError: Scores differ by more than ``tolerance``.
    """
    for side in sides:
        side.pause()
    difference = 0.0

    def play(queries: int) -> tuple[dict[str, float], float]:
        nonlocal difference
        grid = make_grid(queries)
        found, apart = _round(sides, grid)
        _check(apart, tolerance)
        difference = max(difference, apart)
        return found, sum(grid.pairs / rate for rate in found.values())

    _, cost = play(_LEAST_QUERIES)  # seconds a query of the grid, all sides together
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    sizes: list[int] = []
    for number in range(rounds):
        sizes.append(int(min(max(seconds / (rounds - number) / cost, _LEAST_QUERIES), _MOST_QUERIES)))
        found, taken = play(sizes[-1])
        seconds, cost = seconds - taken, taken / sizes[-1]
        for name, rate in found.items():
            rates[name].append(rate)
        say(f"round {number + 1}: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in found.items()))
    return Contest(sizes, rates, difference)


def _round(sides: Sequence[Side], grid: Grid) -> tuple[dict[str, float], float]:
    rates: dict[str, float] = {}
    scores: list[NDArray[np.float32]] = []
    for side in sides:
        side.resume()
        try:
            seconds, found = side.score(grid)
        finally:
            side.pause()
        rates[side.name] = grid.pairs / seconds
        scores.append(found)
    stacked = np.stack(scores)  # (sides, Q, D)
    return rates, float((stacked.max(axis=0) - stacked.min(axis=0)).max())


def _check(difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise DisagreementError(f"raw scores of the same pairs differ by up to {difference}, more than {tolerance}")
