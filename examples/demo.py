"""Demo: serves a reranker, trains a small model without it, with its filter and with its scores, and compares them.

The data is real text that every machine has (see ``examples/docstrings.py``). ``python -m examples.demo --help`` lists
the settings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from examples.program import prepare_process, run_program

DEFAULT_STEPS = 30


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse command-line arguments; ``None`` stands for the arguments of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Trains a small embedding model with and without a reranker service and compares the results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_at_least(3), default=DEFAULT_STEPS, help="training steps of each loss")
    parser.add_argument("--batch-size", type=_at_least(2), default=16, help="triplets of a step")
    parser.add_argument("--layers", type=int, choices=range(1, 7), default=2, help="layers of the trained model")
    parser.add_argument("--pairs", type=_at_least(1), default=4_000, help="maximum number of docstrings to read")
    parser.add_argument(
        "--mined-documents", type=_at_least(1), default=2_000, help="number of candidates for hard negatives"
    )
    parser.add_argument("--queries", type=_at_least(1), default=600, help="maximum number of held-out queries")
    parser.add_argument("--temperature", type=float, default=0.02, help="temperature of all losses")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak learning rate of all trainings")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "torch"),
        default="torch",
        help="engine of the server; on a CPU torch is ready after about 10 s, vllm after about 40 s",
    )
    parser.add_argument("--reranker-url", help="address of a running server to use, such as 127.0.0.1:50051")
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="directory for results and log")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; see :func:`examples.program.run_program` for the exit status that is returned."""
    began = time.monotonic()
    options = parse(arguments)
    prepare_process()
    return run_program(lambda: _run(options, began))


def _run(options: argparse.Namespace, began: float) -> None:
    from rich.console import Console

    from examples.comparison import Settings, run

    settings = Settings(
        steps=options.steps,
        batch_size=options.batch_size,
        layers=options.layers,
        pairs=options.pairs,
        mined_documents=options.mined_documents,
        queries=options.queries,
        held_out_share=0.15,
        temperature=options.temperature,
        learning_rate=options.learning_rate,
        mini_batch_size=32,
        seed=options.seed,
        engine=options.engine,
        reranker_url=options.reranker_url,
        output=options.output,
    )
    run(settings, Console(highlight=False, soft_wrap=True), began)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
