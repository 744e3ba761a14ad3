"""Command ``python -m loss_client compare``: reads the arguments, trains, evaluates, and prints the report."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerError
from loss_client.client.scores import ScoreType
from loss_client.compare.methods import METHODS
from loss_client.compare.report import Result, report
from loss_client.rows import Row, Rows, RowsError
from loss_client.score.output import Output, OutputError

_READY_SECONDS = 60.0
_UNTRAINED = "untrained"

DESCRIPTION = """\
Find out whether a reranker helps on your data. The same model is trained in four ways, with the same seeds and batches,
and each model is evaluated by retrieval:

  no filter              CachedMultipleNegativesRankingLoss
  hardness               the same with hardness_mode="in_batch_negatives", hardness_strength=9
  filter                 RerankerCachedGISTEmbedLoss
  filter + distillation  the same with Distillation()

Rows of --train hold an anchor, a positive and any mined negatives, rows of --eval a query, a relevant document (or a
list of them) and any others: the columns of text count, in their order. Documents of all rows of --eval are searched
for each query. Files are JSON lines, CSV, TSV, Parquet, or directories that datasets saved.

A comparison that was stopped goes on with the next training when the same command is given again.

  python -m loss_client compare --model microsoft/mpnet-base --train train.jsonl --eval held_out.jsonl \\
      --address gpu1:50051 --steps 500 --batch-size 128 --bf16 --output comparison.jsonl
"""
EPILOG = """\
exit status: 0 after a report, 1 after a failure, 130 after an interrupt, 2 for wrong arguments.
Tokens and certificates are taken from the client's variables: RERANKER_CLIENT_TOKEN, RERANKER_CLIENT_TLS_CA, ...
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subcommands of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="train with and without a reranker, and compare the models",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="SentenceTransformer to start from")
    parser.add_argument("--train", type=Path, required=True, metavar="PATH", help="rows to train on")
    parser.add_argument("--eval", type=Path, required=True, metavar="PATH", help="held-out rows")
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="rows with more documents to search")
    parser.add_argument(
        "--address",
        action="append",
        required=True,
        metavar="HOST:PORT",
        help="the server; grpcs://HOST:PORT for TLS; may be given several times",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.jsonl"),
        metavar="FILE",
        help="results of each training; default: comparison.jsonl",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists, instead of going on")
    training = parser.add_argument_group("training")
    training.add_argument("--seeds", type=_whole, default=3, metavar="N", help="trainings of a method; default: 3")
    training.add_argument("--steps", type=_whole, required=True, metavar="N", help="steps of a training")
    training.add_argument("--batch-size", type=_whole, default=64, metavar="B", help="anchors of a batch; default: 64")
    training.add_argument(
        "--mini-batch-size", type=_whole, default=32, metavar="N", help="texts embedded at a time; default: 32"
    )
    training.add_argument("--learning-rate", type=_positive, default=2e-5, help="default: 2e-5")
    training.add_argument("--temperature", type=_positive, default=0.02, help="of all losses; default: 0.02")
    training.add_argument("--bf16", action="store_true", help="train in bfloat16")
    reranker = parser.add_argument_group("reranker")
    reranker.add_argument("--margin", type=float, default=0.05, help="of the filter; default: 0.05")
    reranker.add_argument(
        "--score-type", choices=get_args(ScoreType), default="probability", help='"raw" for a bi-encoder'
    )
    reranker.add_argument("--instruction", metavar="TEXT", help="the task in words; default: the served model's own")
    reranker.add_argument(
        "--max-length", type=_whole, metavar="TOKENS", help="longest input; default: the server's own"
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Train, evaluate and print the report.

    Args:
        options: The parsed arguments, with the parser as ``parser``.

    Returns:
        0 after a report, 1 after a failure. Wrong arguments exit with 2.
    """
    parser: argparse.ArgumentParser = options.parser
    try:
        train = _columns(Rows(options.train))
        held_out, corpus = Rows(options.eval), Rows(options.corpus) if options.corpus else None
        client = RerankerClient(options.address)
    except (RowsError, ValueError) as error:
        parser.error(str(error))
    with client:
        try:
            fingerprint = client.wait_until_ready(_READY_SECONDS).fingerprint
            return _run(options, train, held_out, corpus, client, fingerprint)
        except ImportError as error:
            print(f"loss_client compare needs {error.name}: pip install 'reranker-grpc[train]'", file=sys.stderr)
        except (RowsError, OutputError, RerankerError, OSError) as error:
            print(f"loss_client compare: {error}", file=sys.stderr)
    return 1


def _run(
    options: argparse.Namespace,
    train: list[Row],
    held_out: Rows,
    corpus: Rows | None,
    client: RerankerClient,
    fingerprint: str,
) -> int:
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers import SentenceTransformer

    from loss_client.compare import training
    from loss_client.compare.evaluation import evaluator_of

    names = training.Recipe.__slots__
    recipe = training.Recipe(**{name: getattr(options, name) for name in names})
    evaluator = evaluator_of(held_out.read(), corpus.read() if corpus else ())
    dataset = Dataset.from_list(train)
    if len(dataset) < options.batch_size:
        raise RowsError(f"{options.train} has {len(dataset)} rows, fewer than a batch of {options.batch_size}")
    _say(f"{len(dataset):,} rows to train on; {len(evaluator.queries):,} queries, {len(evaluator.corpus):,} documents")
    files = {name: str(path and path.absolute()) for name, path in vars(options).items() if name in _FILES}
    settings = {"model": options.model, **files, **asdict(recipe)}
    with Output(options.output, settings, options.overwrite) as output, tempfile.TemporaryDirectory() as directory:
        found = {(row["method"], row["seed"]): row for row in Rows(options.output).read()} if output.written else {}
        output.use(fingerprint)
        if output.fingerprint != fingerprint:
            raise OutputError(
                f"{options.output} has results of the reranker {output.fingerprint}, and {options.address} serves "
                f"{fingerprint}: choose another name, or give --overwrite"
            )

        def keep(row: Row) -> Row:
            output.write([row])
            return row

        untrained = found.get((_UNTRAINED, 0))
        if untrained is None:
            ndcg = evaluator.by_query(SentenceTransformer(options.model))
            untrained = keep({"method": _UNTRAINED, "seed": 0, "ndcg": ndcg})
        results = []
        for seed in range(1, options.seeds + 1):
            for method in METHODS:
                row = found.get((method, seed))
                if row is None:
                    _say(f"seed {seed} of {options.seeds}: {method}")
                    made = training.train(options.model, method, seed, dataset, recipe, client, Path(directory))
                    row = keep(
                        asdict(Result(method, seed, evaluator.by_query(made.model), made.seconds, made.masked_fraction))
                    )
                results.append(Result(**row))
        print(report(results, untrained["ndcg"]))
    return 0


_FILES = ("train", "eval", "corpus")


def _columns(rows: Rows) -> list[Row]:
    """Read the columns of text of a training set.

    Raises:
        RowsError: There are fewer than two, or a row lacks one.
    """
    found: list[Row] = []
    names: list[str] = []
    for number, row in enumerate(rows.read(), 1):
        names = names or [name for name, value in row.items() if isinstance(value, str)]
        if len(names) < 2:
            raise RowsError(f"{rows.path} has to have two columns of text or more: anchor, positive, negatives")
        texts = {name: row.get(name) for name in names}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise RowsError(f"{rows.path}, row {number}: column {name!r} has to hold a text, not {text!r}")
        found.append(texts)
    return found


def _say(text: str) -> None:
    print(f"loss_client compare: {text}", file=sys.stderr, flush=True)


def _number(kind: Callable[[str], float], text: str, rule: str) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} has to be {rule}")
    return number


def _whole(text: str) -> int:
    return int(_number(int, text, "a whole number, 1 or more"))


def _positive(text: str) -> float:
    return _number(float, text, "a number above 0")
