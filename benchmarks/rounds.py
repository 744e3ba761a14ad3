"""Contest: compares the speed of several sides, which score the same pairs in turn, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.texts import Grid

DOCUMENTS = 64
"""Documents of a grid, and of one request to an HTTP service."""
_MOST_QUERIES = 64
_LEAST_QUERIES = 1


class Side(Protocol):
    """One way to score pairs, such as a server or an engine.

    Attributes:
        name: Name in the table.
    """

    name: str

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """Score a grid; return the seconds that it took and the raw scores, shape ``(Q, D)``."""

    def pause(self) -> None:
        """Use no processor time until ``resume`` is called."""

    def resume(self) -> None:
        """Become ready to score."""


class DisagreementError(RuntimeError):
    """Two sides gave different scores for the same pairs, so that their speeds cannot be compared."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Distribution of one quantity over several rounds.

    Attributes:
        value: Median.
        low: Least value.
        high: Greatest value.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize values, one a round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Contest:
    """Result of ``contest``.

    Attributes:
        queries: Number of queries in the grid of each round.
        rates: Pairs a second in each round, by the side's name.
        difference: Largest difference between raw scores of two sides.
    """

    queries: list[int]
    rates: dict[str, list[float]]
    difference: float

    def ratio(self, side: str, other: str) -> Spread:
        """Spread of the speed of ``side`` / speed of ``other``, with one ratio a round."""
        return Spread.of([mine / theirs for mine, theirs in zip(self.rates[side], self.rates[other], strict=True)])

    def rate(self, side: str) -> Spread:
        """Spread of one side's pairs a second."""
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

    A warm-up round with one query measures the time that a query takes. Each later round has as many queries as fit
    into its share of the time that is left, so that the rounds become smaller on a machine that becomes slower.

    Args:
        sides: The sides to compare; all are paused except the one that scores.
        make_grid: Makes a new grid with the given number of queries.
        rounds: Number of rounds after the warm-up.
        seconds: Time of all rounds together.
        tolerance: Largest accepted difference between raw scores of two sides.
        say: Prints one line of progress.

    Raises:
        DisagreementError: Scores differ by more than ``tolerance``, or are not finite.
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
