"""Flags of the commands: types of arguments, and the flags that several commands have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

from loss_client.client.scores import ScoreType

_EPILOG = """\
exit status: 0 {success}, 1 {failure}, 130 after an interrupt, 2 for wrong arguments.
Tokens and certificates are taken from the client's variables: RERANKER_CLIENT_TOKEN, RERANKER_CLIENT_TLS_CA, ...
"""

_Mode = TypeVar("_Mode", bound=str)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    success: str,
    failure: str = "after a failure",
) -> argparse.ArgumentParser:
    """Add a command to the subcommands of a parser.

    Args:
        commands: The subcommands.
        name: The command's name.
        run: Runs the command: takes the parsed arguments, with the command's parser as ``parser``, and returns the exit
            status.
        summary: One line about the command.
        description: Description, with line breaks that are kept.
        success: When the exit status is 0.
        failure: When it is 1.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=_EPILOG.format(success=success, failure=failure),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_addresses(parser: argparse.ArgumentParser) -> None:
    """Add ``--address``, which may be given several times."""
    parser.add_argument(
        "--address",
        action="append",
        required=True,
        metavar="HOST:PORT",
        help="the server; grpcs://HOST:PORT for TLS; may be given several times",
    )


def add_overwrite(parser: argparse.ArgumentParser, output: str) -> None:
    """Add ``--overwrite``, for an output that a stopped run goes on with."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {output} if it exists, instead of going on")


def add_max_length(group: argparse._ArgumentGroup) -> None:
    """Add ``--max-length``."""
    group.add_argument(
        "--max-length", type=whole(), metavar="TOKENS", help="longest input, in tokens; default: the server's own limit"
    )


def add_scoring(group: argparse._ArgumentGroup) -> None:
    """Add ``--instruction``, ``--max-length`` and ``--score-type``."""
    group.add_argument("--instruction", metavar="TEXT", help="the task in words; default: the served model's own")
    add_max_length(group)
    group.add_argument(
        "--score-type",
        choices=get_args(ScoreType),
        default="probability",
        help='"raw" for the model\'s own number, such as the cosine of a bi-encoder; default: probability',
    )


def whole(least: int = 1) -> Callable[[str], int]:
    """Make a type of arguments: whole numbers from ``least`` on, such as 1000, 1,000 or 1_000."""

    def read(text: str) -> int:
        try:
            found = int(text.replace(",", "").replace("_", ""))
        except ValueError:
            found = least - 1
        if found < least:
            raise argparse.ArgumentTypeError(f"{text!r} has to be a whole number, {least} or more")
        return found

    return read


def read_number(text: str, right: Callable[[float], bool], rule: str) -> float:
    """Read a number for which ``right`` is true; the error names the ``rule``, such as "a number above 0"."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not right(found):
        raise argparse.ArgumentTypeError(f"{text!r} has to be {rule}")
    return found


def positive(text: str) -> float:
    """Read a finite number above 0."""
    return read_number(text, lambda found: 0 < found < math.inf, "a number above 0")


def fraction(text: str) -> float:
    """Read a number between 0 and 1, both excluded."""
    return read_number(text, lambda found: 0 < found < 1, "a number between 0 and 1")


def names(text: str) -> tuple[str, ...]:
    """Read names with commas between them; empty ones are left out."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_modes(text: str, choices: Sequence[_Mode]) -> tuple[_Mode, ...]:
    """Read modes of the loss: one or more of ``choices``, with commas between them; each of them counts once."""
    given = tuple(dict.fromkeys(names(text))) or ("",)
    if unknown := [name for name in given if name not in choices]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(map(repr, unknown))}: there is no such mode; right are {', '.join(choices)}"
        )
    return tuple(choice for name in given for choice in choices if choice == name)
