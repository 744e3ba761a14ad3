"""The loss's benchmark: what a training step costs beside a reranker, as a table, plots and a file of records.

python -m benchmarks.loss [--quick] [--only PART ...] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from examples.demo import prepare_process

if TYPE_CHECKING:
    from benchmarks.bench import Bench
    from benchmarks.report import Figure

PARTS = ("prefetch", "candidates", "mining")
"""What can be measured alone."""


def run(
    names: Sequence[str], *, output: Path, rounds: int = 3, scale: float = 1.0, console: Console | None = None
) -> list[Figure]:
    """Measure the named parts and write ``loss.json`` and plots into ``output`` as they come in.

    Args:
        names: Of ``PARTS``.
        output: Directory for results and logs; made where it is missing.
        rounds: Rounds of every figure.
        scale: 1 for a full run, under ten minutes on two cores; less for a look at small sizes.
        console: Where progress and the table go.
    """
    # Libraries read the environment as they are imported: prepare_process comes first.
    from transformers.utils import logging

    from benchmarks import loss_candidates, loss_prefetch, mining, report
    from benchmarks.bench import Bench
    from benchmarks.launch import Launcher, Machine
    from benchmarks.service import build_models
    from benchmarks.texts import Corpus

    parts: dict[str, Callable[[Bench], list[Figure]]] = {
        "prefetch": lambda bench: loss_prefetch.never_waiting(bench, output / "loss-prefetch.svg"),
        "candidates": lambda bench: loss_candidates.selection(bench, output / "loss-candidates.svg"),
        "mining": mining.mining_figures,
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
    console.print(f"{time.monotonic() - began:.0f} s on {where}; {rounds} rounds; records and plots in {output}")
    return figures


def main() -> None:
    """Run the benchmark from the command line."""
    # Every process that was started ends with this one, also if it is told to end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds of small sizes: a look, no figures")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these parts")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for results and logs")
    arguments = parser.parse_args()
    prepare_process()
    rounds, scale = (2, 0.1) if arguments.quick else (3, 1.0)
    run(arguments.only, output=arguments.output, rounds=rounds, scale=scale)


if __name__ == "__main__":
    main()
