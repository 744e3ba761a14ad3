"""Fault injection: counts of the scores that callers get while servers, connections and clocks fail.

python -m chaos [--quick] [--only FAULT ...] [--vllm] [--output DIRECTORY]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.command_line import parse
from examples.program import prepare_process

NAMES = ("kill", "pause", "roll", "terminate", "cut", "envoy", "budget", "model", "clock", "training", "vllm")
"""Faults that ``--only`` can name; "vllm" needs ``--vllm``."""
_LIMIT_SECONDS = 1800
_TABLE_WIDTH = 110


def run(names: Sequence[str], *, quick: bool, output: Path) -> bool:
    """Inject the named faults, one after the other; write ``chaos.jsonl`` after each, and print the table.

    Args:
        names: Names of faults.
        quick: Whether to inject each fault only twice, in small jobs.
        output: Directory for the results; created if it is missing.

    Returns:
        Whether every fault was injected often enough, without any harm to a caller.
    """
    # Imported late: libraries read the variables that prepare_process sets when they are imported.
    from rich.console import Console
    from transformers.utils import logging

    from chaos import clock, model, report
    from chaos.ledger import counted_matrices
    from chaos.run import QUICK, Sizes
    from chaos.suite import inject

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    output.mkdir(parents=True, exist_ok=True)
    path = output / "chaos.jsonl"
    path.unlink(missing_ok=True)
    begun = time.monotonic()
    outcomes: list[report.Outcome] = []
    with tempfile.TemporaryDirectory(prefix="reranker-chaos-") as made, counted_matrices():
        directory = Path(made)
        served = model.build(directory / "model")
        with clock.shifted_processes(directory):
            for name in names:
                console.print(f"[bold]{name}[/]  [dim]after {time.monotonic() - begun:.0f} s[/]")
                outcomes.append(inject(name, QUICK if quick else Sizes(), served))
                report.append(path, outcomes[-1])
    console.print(report.table(outcomes))
    for line in report.explanations(outcomes):
        console.print(line, markup=False)
    console.print(f"{time.monotonic() - begun:.0f} s on {len(os.sched_getaffinity(0))} cores; the counts are in {path}")
    return all(outcome.clean for outcome in outcomes)


def main() -> None:
    """Inject faults from the command line; exits with 1 if one harmed a caller, or was not injected often enough."""
    arguments = parse(
        __doc__,
        NAMES,
        quick="two injections of each fault, in small jobs",
        flags={"vllm": "kill vLLM's worker too, three times; each start of vLLM takes a minute"},
    )
    prepare_process()
    # Processes with spinning threads slow each other down, and one thread gives the same weights in each training.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(_LIMIT_SECONDS)
    names = [name for name in arguments.only if name != "vllm" or arguments.vllm]
    if not names:
        sys.exit("python -m chaos: the fault vllm needs the flag --vllm")
    sys.exit(not run(names, quick=arguments.quick, output=arguments.output))


def _too_late(number: int, frame: FrameType | None) -> None:
    raise SystemExit(f"not done after {_LIMIT_SECONDS} s")


if __name__ == "__main__":
    main()
