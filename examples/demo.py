"""The main job, end to end: serve a reranker, train a small model with and without it, compare.

On real text that every machine has (see ``examples/docstrings.py``), in under ten minutes on two cores without a GPU.
``python -m examples.demo --help`` lists the settings.
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
    """Read the command line; ``None`` is this process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Trains a small embedding model with and without a reranker service, and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_at_least(2), default=DEFAULT_STEPS, help="training steps of each loss")
    parser.add_argument("--batch-size", type=_at_least(2), default=48, help="triplets of a step")
    parser.add_argument("--pairs", type=_at_least(1), default=20_000, help="docstrings to read, at most")
    parser.add_argument(
        "--mined-documents", type=_at_least(1), default=5_000, help="where hard negatives are looked for"
    )
    parser.add_argument("--queries", type=_at_least(1), default=2_000, help="held-out queries to ask, at most")
    parser.add_argument("--temperature", type=float, default=0.02, help="of all losses")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of all trainings")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="of the reranker server")
    parser.add_argument("--reranker-url", help="use this running server, such as 127.0.0.1:50051")
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="where the results are written")
    return parser.parse_args(arguments)


def prepare_process() -> None:
    """Set what libraries read when they are imported, here and in the server: call it first.

    No model hub is asked for anything. Progress bars move seldom where nobody watches. And threads that wait for others
    sleep: training and server share the cores, and a thread that spins while it waits, as is the default, takes the
    core that the other needs (matrix products beside a busy process took twice as long).
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # The first for bars that can be turned off so, the second for the others.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "10")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: 0, 1 if it could not be done, 130 if it was interrupted.
    """
    options = parse(arguments)
    prepare_process()
    # Ended from outside as by Ctrl-C: the server must not stay behind.
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
