"""Bench: the launcher, texts, models and sizes of one benchmark run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.launch import Launcher
from benchmarks.texts import Corpus


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the benchmark.

    Attributes:
        launcher: Starts the servers and workers.
        corpus: Supplies queries and documents.
        models: Directory of each model, by name.
        rounds: Number of rounds behind every figure.
        scale: Share of a full run's time to spend, in (0, 1].
        say: Prints one line of progress.
    """

    launcher: Launcher
    corpus: Corpus
    models: dict[str, Path]
    rounds: int
    scale: float
    say: Callable[[str], object]

    @property
    def score_tolerance(self) -> float:
        """Largest accepted difference between raw scores of two sides."""
        # In 16 bits, rounding differs more between batches of different shapes.
        return 0.02 if self.launcher.machine.dtype == "float32" else 0.5
