"""Command line of the training package: ``python -m loss_client COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from loss_client.compare import command as compare
from loss_client.plan import command as plan
from loss_client.score import command as score


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments of the command line; None for those of this process.

    Returns:
        The exit status: 0 for success, 1 for a failure, 130 after an interrupt. Wrong arguments exit with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m loss_client", description="Commands for training with a reranker.")
    parser.add_argument("--version", action="version", version=f"reranker-grpc {metadata.version('reranker-grpc')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    plan.add_parser(commands)
    score.add_parser(commands)
    compare.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
