"""What every part of the benchmark is given."""

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
        launcher: Starts processes.
        corpus: Gives texts.
        models: Directory of the models, by name.
        rounds: Rounds of every figure.
        scale: 1 for a full run; smaller runs take that share of the time.
        say: Is told what is going on.
    """

    launcher: Launcher
    corpus: Corpus
    models: dict[str, Path]
    rounds: int
    scale: float
    say: Callable[[str], object]
