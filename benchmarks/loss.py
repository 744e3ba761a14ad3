"""Benchmark of the loss: cost of a training step with a reranker, as a table, plots and a JSON file.

python -m benchmarks.loss [--quick] [--only PART ...] [--output DIRECTORY]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.command_line import parse
from examples.program import prepare_process

if TYPE_CHECKING:
    from benchmarks.bench import Bench
    from benchmarks.report import Figure

PARTS = ("prefetch", "auto", "accumulation", "ranks", "candidates", "curve", "cost", "mining", "servers")
"""Parts that can be measured alone."""


def run(
    names: Sequence[str], *, output: Path, rounds: int = 3, scale: float = 1.0, console: Console | None = None
) -> list[Figure]:
    """Measure the named parts; write ``loss.json`` and the plots into ``output`` after each part.

    Args:
        names: Names from ``PARTS``.
        output: Directory for results and logs; created if it is missing.
        rounds: Number of rounds behind every figure.
        scale: 1 for a full run (some 17 minutes on two cores); anything below 1 for a quick run at small sizes.
        console: Console for progress and the table.
    """
    # Imported late: libraries read the variables that prepare_process sets when they are imported.
    from transformers.utils import logging

    from benchmarks import (
        loss_accumulation,
        loss_auto,
        loss_candidates,
        loss_cost,
        loss_curve,
        loss_prefetch,
        loss_ranks,
        mining,
        report,
        servers,
    )
    from benchmarks.bench import Bench
    from benchmarks.launch import Launcher, Machine
    from benchmarks.service import build_models
    from benchmarks.texts import Corpus

    parts: dict[str, Callable[[Bench], list[Figure]]] = {
        "prefetch": lambda bench: loss_prefetch.prefetch_figures(bench, output / "loss-prefetch.svg"),
        "auto": loss_auto.auto_figures,
        "accumulation": loss_accumulation.accumulation_figures,
        "ranks": loss_ranks.ranks_figures,
        "candidates": lambda bench: loss_candidates.candidates_figures(bench, output / "loss-candidates.svg"),
        "curve": lambda bench: loss_curve.curve_figures(bench, output / "loss-curve.svg"),
        "cost": loss_cost.cost_figures,
        "mining": mining.mining_figures,
        "servers": lambda bench: servers.servers_figures(bench, output / "servers.svg"),
    }
    console = console or Console()
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    figures: list[Figure] = []
    machine, corpus = Machine.here(), Corpus(600) if scale < 1 else Corpus()
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory:
        bench = Bench(
            Launcher(machine, logs),
            corpus,
            build_models(Path(directory), machine, corpus, ()),
            rounds,
            scale,
            lambda line: console.print(f"[dim]  {line}[/]"),
        )
        for name in names:
            console.print(f"[bold]{name}[/]  [dim]after {time.monotonic() - began:.0f} s[/]")
            figures += parts[name](bench)
            report.write(output / "loss.json", figures)
    console.print(report.table(figures))
    where = "a GPU" if machine.cuda else f"{len(machine.cores)} cores"
    console.print(f"{time.monotonic() - began:.0f} s on {where}; {rounds} rounds; loss.json and plots are in {output}")
    return figures


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = parse(__doc__, PARTS, quick="2 rounds at small sizes, too few for figures")
    prepare_process()
    rounds, scale = (2, 0.1) if arguments.quick else (3, 1.0)
    run(arguments.only, output=arguments.output, rounds=rounds, scale=scale)


if __name__ == "__main__":
    main()
