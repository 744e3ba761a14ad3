"""Demo: serves a reranker, trains a small model with and without it, and compares the results.

The data is real text that every machine has (see ``examples/docstrings.py``). ``python -m examples.demo --help`` lists
the settings.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

DEFAULT_STEPS = 36


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse command-line arguments; ``None`` stands for the arguments of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Trains a small embedding model with and without a reranker service and compares the results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_at_least(2), default=DEFAULT_STEPS, help="training steps of each loss")
    parser.add_argument("--batch-size", type=_at_least(2), default=48, help="triplets of a step")
    parser.add_argument("--pairs", type=_at_least(1), default=20_000, help="maximum number of docstrings to read")
    parser.add_argument(
        "--mined-documents", type=_at_least(1), default=5_000, help="number of candidates for hard negatives"
    )
    parser.add_argument("--queries", type=_at_least(1), default=2_000, help="maximum number of held-out queries")
    parser.add_argument("--temperature", type=float, default=0.02, help="temperature of all losses")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate of all trainings")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="engine of the server")
    parser.add_argument("--reranker-url", help="address of a running server to use, such as 127.0.0.1:50051")
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="directory for results and log")
    return parser.parse_args(arguments)


def prepare_process() -> None:
    """Set environment variables that libraries read on import, here and in the server. Call it before other imports.

    The libraries use no model hub, progress bars are off or slow unless stderr is a terminal, and OpenMP threads sleep
    while they wait. By default they spin, and because training and server share the cores, spinning takes a core from
    the other process (matrix products beside a busy process took twice as long).
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # TQDM_DISABLE has no effect on bars that set ``disable`` themselves; those are updated every 10 s.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "10")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: 0 for success, 1 for an error, 130 if the demo was interrupted.
    """
    options = parse(arguments)
    prepare_process()
    # SIGTERM raises KeyboardInterrupt like Ctrl-C, so that the server is ended as well.
    signal.signal(signal.SIGTERM, _interrupt)

    import datasets  # type: ignore[import-untyped]
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from examples.comparison import Settings, run
    from examples.serving import ServerStartError
    from loss_client import RerankerError

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    console = Console(highlight=False, soft_wrap=True)
    settings = Settings(
        steps=options.steps,
        batch_size=options.batch_size,
        pairs=options.pairs,
        mined_documents=options.mined_documents,
        queries=options.queries,
        held_out_share=0.1,
        temperature=options.temperature,
        learning_rate=options.learning_rate,
        mini_batch_size=32,
        seed=options.seed,
        engine=options.engine,
        reranker_url=options.reranker_url,
        output=options.output,
    )
    try:
        run(settings, console)
    except (ServerStartError, RerankerError, ValueError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the server has been ended")
        return 130
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
