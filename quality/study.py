"""Command line of the study: trains small models with and without the reranker's filter on real text, and evaluates.

Allow more than two hours on two cores without a GPU; docs/quality.md has the measured times and explains the settings.
Results are saved as they come: an interrupted study continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from examples.program import prepare_process, run_program


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse command-line arguments; ``None`` stands for the arguments of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m quality.study",
        description="Trains small models with and without the reranker's filter and compares their quality.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: tests that everything runs, results mean nothing"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("screening", "final", "related", "cross-encoder", "large", "candidates"),
        help="the parts of the study to run; without it, all",
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=("docstrings", "code"),
        help="the data sets to train and evaluate on; without it, all. Two studies, one of each, may run side by side",
    )
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="torch", help="engine of the servers")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for results and logs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the study; see :func:`examples.program.run_program` for the exit status that is returned."""
    options = parse(arguments)
    prepare_process()
    return run_program(
        lambda: _run(options),
        interrupted="Interrupted; the servers have been ended. Run the same command again to continue.",
    )


def _run(options: argparse.Namespace) -> None:
    from quality.plan import FULL, quick
    from quality.run import Study

    plan = quick() if options.quick else FULL
    if options.sources:
        plan = plan.on(options.sources)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:5.1f} min] {text}", flush=True)

    Study(plan, options.output, options.engine, say, options.stages).run()


if __name__ == "__main__":
    sys.exit(main())
