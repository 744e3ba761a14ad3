"""Does the filter make better models? Trains small models with it and without it on real text, and measures.

About an hour on two cores without a GPU. What was found is kept: a study that was interrupted goes on where it was.
``python -m quality.study --help`` lists the settings; docs/quality.md explains them.
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
    """Read the command line; ``None`` is this process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m quality.study",
        description="Measures whether the reranker's filter makes better models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="every part on next to nothing: only shows that it runs")
    parser.add_argument("--seeds", type=int, choices=range(1, 11), help="trainings of each kind (default: as planned)")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="torch", help="of the reranker servers")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="where the results are written")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the study.

    Returns:
        The exit status: 0, 1 if it could not be done, 130 if it was interrupted.
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
        console.print("Interrupted; the servers have been ended. The same command goes on from here.")
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
