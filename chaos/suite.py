"""Suite: every fault by name, and the run of one of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from chaos import budget, clock, envoy, faults, training, worker
from chaos.report import Outcome
from chaos.run import Run, Sizes, SkippedError

FAULTS: dict[str, Callable[[Run], None]] = {
    "kill": faults.killed_servers,
    "pause": faults.paused_servers,
    "roll": faults.rolling_restarts,
    "terminate": faults.terminated_servers,
    "cut": faults.cut_connections,
    "envoy": envoy.aborted_and_delayed_calls,
    "budget": budget.full_budget,
    "model": faults.other_models,
    "clock": clock.jumping_clock,
    "training": training.killed_in_training,
    "vllm": worker.killed_workers,
}
"""Faults that can be injected alone, in order."""


def inject(name: str, sizes: Sizes, model: Path) -> Outcome:
    """Inject one fault while jobs run, and return the counts; errors of the run itself count as errors.

    Args:
        name: A name from ``FAULTS``.
        sizes: Sizes of the run.
        model: Directory that ``chaos.model.build`` wrote.
    """
    with tempfile.TemporaryDirectory(prefix="reranker-chaos-") as directory:
        run = Run(sizes, model, Path(directory))
        try:
            FAULTS[name](run)
        except SkippedError as reason:
            return Outcome(name, skipped=str(reason))
        except Exception as error:
            run.ledger.error(error)
        return run.outcome(name)
