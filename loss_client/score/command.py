"""Command ``python -m loss_client score``: reads the arguments, scores the rows, and writes them."""

from __future__ import annotations

import argparse
import importlib
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerError
from loss_client.client.options import JobOptions
from loss_client.flags import add_addresses, add_command, add_overwrite, add_scoring, names, read_number, whole
from loss_client.rows import Row, Rows, RowsError
from loss_client.score import promote
from loss_client.score.output import Output, OutputError
from loss_client.score.pairs import Asked, Columns, NegativesColumns, PairColumns
from loss_client.score.scoring import Totals, score_rows

_BATCH_PAIRS = 4096
_IN_FLIGHT = 4

DESCRIPTION = """\
Add a reranker's scores to the rows of a file. INPUT has a query and a document, or a query and a list of documents, in
each row: JSON lines (.jsonl), a table (.csv, .tsv, .parquet), or a directory that datasets saved. OUTPUT gets the same
rows as JSON lines, each with its score or its list of scores. A run that was stopped goes on where it was when the same
command is given again.

With --promote, rows hold an anchor, a positive and mined negatives. Negatives that the reranker scores above the
positive by more than MARGIN become positives, in rows of their own. OUTPUT is then a directory for datasets, which
sentence-transformers' losses take, and the scores are beside it in OUTPUT.scores.jsonl. If fewer negatives are left in
a row, they are repeated; if none is left, positives of other rows are taken.

  python -m loss_client score pairs.jsonl scored.jsonl --address gpu1:50051
  python -m loss_client score mined.parquet scored.jsonl --address gpu1:50051 --query-column anchor \\
      --document-column candidates --score-type raw
  python -m loss_client score mined/ promoted/ --address gpu1:50051 --promote 0.1
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subcommands of a parser."""
    parser = add_command(
        commands,
        "score",
        run,
        summary="add a reranker's scores to the rows of a file",
        description=DESCRIPTION,
        success="when all rows are written",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="file or directory with the rows")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file of JSON lines; with --promote, a directory")
    add_addresses(parser)
    parser.add_argument(
        "--promote", type=_margin, metavar="MARGIN", help="make positives of negatives that score above the positive"
    )
    add_overwrite(parser, "OUTPUT")
    columns = parser.add_argument_group("columns")
    columns.add_argument(
        "--query-column", metavar="NAME", help='column of the query; default: "query", with --promote "anchor"'
    )
    columns.add_argument(
        "--document-column",
        metavar="NAME",
        help='column of the document or the list of documents; default: "document" or "documents", with --promote '
        '"positive"',
    )
    columns.add_argument(
        "--negative-columns",
        type=names,
        metavar="NAMES",
        help='with --promote, columns of the negatives, with commas; default: those that begin with "negative"',
    )
    columns.add_argument(
        "--score-column", metavar="NAME", help='column for the scores; default: "score", or "scores" for a list'
    )
    scoring = parser.add_argument_group("scoring")
    add_scoring(scoring)
    scoring.add_argument(
        "--batch-pairs",
        type=whole(),
        default=_BATCH_PAIRS,
        metavar="N",
        help=f"pairs of a batch; default: {_BATCH_PAIRS}",
    )
    scoring.add_argument(
        "--in-flight", type=whole(), default=_IN_FLIGHT, metavar="N", help=f"batches in flight; default: {_IN_FLIGHT}"
    )


def run(options: argparse.Namespace) -> int:
    """Score the rows.

    Args:
        options: The parsed arguments, with the parser as ``parser``.

    Returns:
        0 when all rows are written, 1 after a failure, 130 after an interrupt. Wrong arguments exit with 2.
    """
    parser: argparse.ArgumentParser = options.parser
    promoting = options.promote is not None
    scored = options.output.with_name(f"{options.output.name}.scores.jsonl") if promoting else options.output
    try:
        rows = Rows(options.input)
        columns = _columns(options, rows)
        if promoting:
            _check_directory(options)
        output = Output(scored, _settings(options, columns), options.overwrite)
    except (RowsError, OutputError, OSError) as error:
        parser.error(str(error))
    with ExitStack() as resources:
        resources.enter_context(output)
        try:
            client = resources.enter_context(RerankerClient(options.address))
        except ValueError as error:
            parser.error(str(error))
        try:
            totals = _score(client, rows, columns, output, options)
        except (RerankerError, RowsError, OSError) as error:
            print(f"loss_client score: stopped after {output.written:,} rows: {error}", file=sys.stderr)
            if isinstance(error, RerankerError):
                print("loss_client score: give the same command again to go on", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(
                f"loss_client score: stopped after {output.written:,} rows; the same command goes on", file=sys.stderr
            )
            return 130
        print(
            f"{scored}: {output.written:,} rows, {totals.rows:,} of them now: {totals.pairs:,} pairs, "
            f"{totals.cached_pairs:,} from the server's cache, {totals.truncated_pairs:,} truncated; model "
            f"{output.fingerprint}"
        )
    if isinstance(columns, NegativesColumns):
        counts = promote.save(scored, options.output, columns, options.promote)
        print(
            f"{options.output}: {counts.written:,} rows from {counts.rows:,}; {counts.promoted:,} negatives of "
            f"{counts.rows_with_promotion:,} rows became positives; negatives repeated in {counts.repeated:,} rows, "
            f"drawn from other rows in {counts.drawn:,}; {counts.left_out:,} rows left out"
        )
    return 0


def _score(client: RerankerClient, rows: Rows, columns: Columns, output: Output, options: argparse.Namespace) -> Totals:
    job = JobOptions(
        instruction=options.instruction, max_length=options.max_length, score_type=options.score_type, priority="bulk"
    )
    with ExitStack() as resources:
        advance = _progress(resources, rows, output.written)
        return score_rows(
            client,
            _asked(rows, columns, output),
            columns,
            output,
            job,
            batch_pairs=options.batch_pairs,
            in_flight=options.in_flight,
            on_rows=advance,
        )


def _asked(rows: Rows, columns: Columns, output: Output) -> Iterator[Asked]:
    """Yield the rows that the output lacks.

    Raises:
        RowsError: The last row of the output is not that of the input.
    """
    done = output.written
    for number, row in enumerate(rows.read(max(done - 1, 0)), max(done - 1, 0) + 1):
        asked = columns.read(row, number)
        if number > done:
            yield asked
        elif output.last is None or any(output.last.get(name) != value for name, value in _plain(row).items()):
            raise RowsError(f"{rows.path} has changed: its row {number} is not the one of the output. Give --overwrite")


def _plain(row: Row) -> Row:
    """Return the values that come back from JSON as they were."""
    return {name: value for name, value in row.items() if isinstance(value, str)}


def _progress(resources: ExitStack, rows: Rows, written: int) -> Any:
    try:
        tqdm: Any = importlib.import_module("tqdm")
    except ImportError:  # with the client alone
        return lambda rows: None
    # On a terminal alone: a log would get a line for each refresh.
    bar = resources.enter_context(tqdm.tqdm(total=rows.count(), initial=written, unit=" rows", disable=None))
    return bar.update


def _settings(options: argparse.Namespace, columns: Columns) -> dict[str, Any]:
    names = columns.__slots__
    return {
        "input": str(options.input.absolute()),
        "instruction": options.instruction,
        "max_length": options.max_length,
        "score_type": options.score_type,
        "columns": {name: _listed(getattr(columns, name)) for name in names},
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _columns(options: argparse.Namespace, rows: Rows) -> Columns:
    if options.promote is None:
        if options.negative_columns:
            raise RowsError("--negative-columns is for --promote")
        return PairColumns(options.query_column or "query", options.document_column, options.score_column)
    first = next(rows.read(), {})
    negatives = options.negative_columns or tuple(name for name in first if name.startswith("negative"))
    if not negatives:
        raise RowsError(
            f'{rows.path} has no column whose name begins with "negative", but {", ".join(map(repr, first))}: name '
            "them with --negative-columns"
        )
    return NegativesColumns(
        options.query_column or "anchor",
        options.document_column or "positive",
        negatives,
        options.score_column or "scores",
    )


def _check_directory(options: argparse.Namespace) -> None:
    try:
        importlib.import_module("datasets")
    except ImportError:
        raise RowsError("--promote needs the package datasets: pip install 'reranker-grpc[train]'") from None
    if not options.output.exists():
        return
    if not options.overwrite:
        raise OutputError(f"{options.output} exists: choose another name, or give --overwrite")
    if not (options.output / "dataset_info.json").exists():
        raise OutputError(f"{options.output} exists and was not saved by datasets: choose another name")
    shutil.rmtree(options.output)


def _margin(text: str) -> float:
    return read_number(text, lambda found: 0 <= found < math.inf, "a number, 0 or more, in units of the scores")
