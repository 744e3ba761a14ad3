"""Command line of the study: trains small models with and without the reranker's filter on real text, and evaluates.

The study takes about an hour on two cores without a GPU. Results are saved as they come: an interrupted study continues
where it stopped. ``python -m quality.study --help`` lists the settings; docs/quality.md explains them.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from examples.demo import prepare_process


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
    parser.add_argument("--seeds", type=int, choices=range(1, 11), help="number of seeds (default: as in the plan)")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="torch", help="engine of the servers")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for results and logs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the study.

    Returns:
        The exit status: 0 for success, 1 for an error, 130 if the study was interrupted.
    """
    options = parse(arguments)
    prepare_process()
    # Ended from outside as by Ctrl-C: the servers must not stay behind.
    signal.signal(signal.SIGTERM, _interrupt)

    import datasets  # type: ignore[import-untyped]
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from examples.serving import ServerStartError
    from loss_client import RerankerError
    from quality.plan import FULL, quick
    from quality.run import Study

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    plan = quick() if options.quick else FULL
    if options.seeds is not None:
        plan = replace(plan, seeds=tuple(range(options.seeds)))
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{(time.monotonic() - began) / 60:5.1f} min] {text}")

    try:
        Study(plan, options.output, options.engine, say).run()
    except (ServerStartError, RerankerError, ValueError) as error:
        console.print(f"{type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the servers have been ended. Run the same command again to continue.")
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
