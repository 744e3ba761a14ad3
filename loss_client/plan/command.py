"""Command ``python -m loss_client plan``: reads the arguments, measures, computes, and prints the report."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerError
from loss_client.flags import add_command, add_max_length, names, positive, read_modes, whole
from loss_client.plan import report
from loss_client.plan.advice import advise
from loss_client.plan.arithmetic import Candidates, Cost, Plan, Speed
from loss_client.plan.batch import Batch
from loss_client.plan.measure import Measurement, measure
from loss_client.plan.texts import RandomWords, TextSource, read_rows

_ANSWER_SECONDS = 10.0
_QUERY_WORDS, _DOCUMENT_WORDS, _COLUMNS = 10, 100, 2

DESCRIPTION = """\
Measure a reranker, and say what each mode of the loss costs: pairs a step, seconds of scoring, the time of a step,
servers that are needed so that no step waits, bytes, and GPU hours an epoch. The last line is advice.

  python -m loss_client plan --batch 1024 --columns 2 --step-seconds 0.5 --address gpu1:50051
  python -m loss_client plan --batch 1024 --step-seconds 0.5 --pairs-per-second 3000 --rows 1000000
  python -m loss_client plan --batch 256 --step-seconds 0.7 --address gpu1:50051 --texts train.jsonl --servers 4
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subcommands of a parser."""
    parser = add_command(
        commands,
        "plan",
        run,
        summary="measure a reranker, and say what each mode of the loss costs",
        description=DESCRIPTION,
        success="after a report",
        failure="if the server cannot be measured",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=whole(), required=True, metavar="B", help="rows of a batch (of one rank)")
    training.add_argument(
        "--step-seconds",
        type=positive,
        required=True,
        metavar="T",
        help="seconds of a training step without a reranker, for example with CachedMultipleNegativesRankingLoss",
    )
    training.add_argument(
        "--columns",
        type=whole(2),
        metavar="C",
        help=f"columns of a row: anchor, positive, mined negatives; default: those of --texts, or {_COLUMNS}",
    )
    training.add_argument("--ranks", type=whole(), default=1, metavar="W", help="training processes; default: 1")
    training.add_argument(
        "--gather-across-devices", action="store_true", help="the loss compares anchors with the documents of all ranks"
    )
    epoch = training.add_mutually_exclusive_group()
    epoch.add_argument("--steps-per-epoch", type=whole(), metavar="N", help="steps of an epoch, for its GPU hours")
    epoch.add_argument(
        "--rows", type=whole(), metavar="N", help="rows of the training set, instead; default: those of --texts"
    )
    training.add_argument(
        "--candidates",
        type=_candidates,
        default=get_args(Candidates),
        metavar="MODES",
        help="modes to compare, with commas; default: all,nearest",
    )
    training.add_argument(
        "--per-anchor",
        type=positive,
        default=16.0,
        metavar="K",
        help='pairs an anchor beyond its own documents with candidates="nearest"; default: 16',
    )
    server = parser.add_argument_group("server")
    speed = server.add_mutually_exclusive_group(required=True)
    speed.add_argument("--address", metavar="HOST:PORT", help="the server to measure; grpcs://HOST:PORT for TLS")
    speed.add_argument("--target", dest="address", action=_FormerFlag, help=argparse.SUPPRESS)
    speed.add_argument("--pairs-per-second", type=positive, metavar="X", help="its speed, instead of a measurement")
    server.add_argument(
        "--servers", type=whole(), default=1, metavar="N", help="such servers that there are or may be; default: 1"
    )
    server.add_argument(
        "--seconds", type=positive, default=5.0, metavar="S", help="seconds to measure, roughly; default: 5"
    )
    add_max_length(server)
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--texts",
        type=Path,
        metavar="FILE.jsonl",
        help="rows of the training set as JSON objects, the query's column first; or a directory that datasets saved",
    )
    texts.add_argument(
        "--query-words", type=whole(), metavar="N", help=f"words of a query, without --texts; default: {_QUERY_WORDS}"
    )
    texts.add_argument(
        "--document-words",
        type=whole(),
        metavar="N",
        help=f"words of a document, without --texts; default: {_DOCUMENT_WORDS}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


class _FormerFlag(argparse.Action):
    """Sets the value of the flag that is named as ``dest`` now, with a warning."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        warnings.warn(f"{option_string} is now named --{self.dest}.", FutureWarning, stacklevel=2)
        setattr(namespace, self.dest, values)


def run(options: argparse.Namespace) -> int:
    """Measure and print.

    Args:
        options: The parsed arguments, with the parser as ``parser``.

    Returns:
        0 after a report, 1 if the server could not be measured. Wrong arguments exit with 2.
    """
    parser: argparse.ArgumentParser = options.parser
    if options.texts is not None and (options.query_words or options.document_words):
        parser.error("--texts gives the lengths of the texts: leave out --query-words and --document-words")
    client = None
    try:
        source: TextSource = RandomWords(options.query_words or _QUERY_WORDS, options.document_words or _DOCUMENT_WORDS)
        columns, rows = options.columns or _COLUMNS, options.rows
        if options.texts is not None:
            source = found = read_rows(options.texts)
            columns, rows = options.columns or found.columns, options.rows or found.count
        batch = Batch(options.batch, columns, options.ranks, options.gather_across_devices)
        if options.address is not None:
            client = RerankerClient(options.address, cache_pairs=0)
    except ValueError as error:
        parser.error(str(error))
    measured = None
    if client is not None:
        try:
            with client:
                measured = _measured(client, source, options)
        except RerankerError as error:
            print(f"loss_client plan: {options.address} could not be measured: {error}", file=sys.stderr)
            return 1
    plan = Plan(
        batch=batch,
        train_seconds=options.step_seconds,
        speed=Speed(options.pairs_per_second) if measured is None else measured.speed,
        servers=options.servers,
        texts=source.sizes(),
        chunk_pairs=(measured and measured.chunk_pairs) or None,
        steps=options.steps_per_epoch or (math.ceil(rows / batch.anchors) if rows else None),
    )
    write = report.as_json if options.json else report.as_text
    advice = advise(plan, options.candidates, options.per_anchor)
    print(write(plan, _costs(plan, options), measured, options.address, advice))
    return 0


def _measured(client: RerankerClient, source: TextSource, options: argparse.Namespace) -> Measurement:
    print(f"measuring {options.address} for some {options.seconds:g} seconds", file=sys.stderr, flush=True)
    return measure(client, source, options.seconds, options.max_length, _ANSWER_SECONDS)


def _costs(plan: Plan, options: argparse.Namespace) -> list[Cost]:
    modes = [plan.own_documents()]
    if "nearest" in options.candidates:
        modes += [plan.nearest_auto(), plan.nearest(options.per_anchor), *plan.top_p()]
    if "all" in options.candidates:
        modes.append(plan.all_pairs())
    return [plan.cost(mode) for mode in modes]


def _candidates(text: str) -> tuple[Candidates, ...]:
    if "mass" in (given := names(text)):
        warnings.warn('"mass" is now a part of "nearest", with top_p.', FutureWarning, stacklevel=2)
    return read_modes(",".join("nearest" if name == "mass" else name for name in given), get_args(Candidates))
