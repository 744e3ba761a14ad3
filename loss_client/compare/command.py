"""Command ``python -m loss_client compare``: reads the arguments, trains, evaluates, and prints the report."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from loss_client.client.addresses import parse_addresses
from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerError
from loss_client.compare.methods import WITH_ALL_PAIRS, methods_of
from loss_client.compare.report import Result, report
from loss_client.flags import (
    add_addresses,
    add_command,
    add_overwrite,
    add_scoring,
    fraction,
    positive,
    read_modes,
    whole,
)
from loss_client.plan.arithmetic import Candidates
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

With --candidates nearest, the last two score the nearest pairs only. With --candidates all,nearest they are trained in
both ways, and the report says whether scoring the nearest pairs only costs quality.

Rows of --train hold an anchor, a positive and any mined negatives, rows of --eval a query, a relevant document (or a
list of them) and any others: the columns of text count, in their order. Documents of all rows of --eval are searched
for each query. Files are JSON lines, CSV, TSV, Parquet, or directories that datasets saved.

A comparison that was stopped goes on with the next training when the same command is given again. --seeds and the
options of nearest pairs may change from run to run: only the trainings that are not yet in --output run.

  python -m loss_client compare --model microsoft/mpnet-base --train train.jsonl --eval held_out.jsonl \\
      --address gpu1:50051 --steps 500 --batch-size 128 --bf16 --output comparison.jsonl
  python -m loss_client compare --model microsoft/mpnet-base --train train.jsonl --eval held_out.jsonl \\
      --address gpu1:50051 --steps 500 --batch-size 128 --bf16 --output comparison.jsonl \\
      --candidates all,nearest --preselector sentence-transformers/all-MiniLM-L6-v2 --per-anchor 16
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subcommands of a parser."""
    parser = add_command(
        commands,
        "compare",
        run,
        summary="train with and without a reranker, and compare the models",
        description=DESCRIPTION,
        success="after a report",
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="SentenceTransformer to start from")
    parser.add_argument("--train", type=Path, required=True, metavar="PATH", help="rows to train on")
    parser.add_argument("--eval", type=Path, required=True, metavar="PATH", help="held-out rows")
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="rows with more documents to search")
    add_addresses(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.jsonl"),
        metavar="FILE",
        help="results of each training; default: comparison.jsonl",
    )
    add_overwrite(parser, "--output")
    training = parser.add_argument_group("training")
    training.add_argument("--seeds", type=whole(), default=3, metavar="N", help="trainings of a method; default: 3")
    training.add_argument("--steps", type=whole(), required=True, metavar="N", help="steps of a training")
    training.add_argument("--batch-size", type=whole(), default=64, metavar="B", help="anchors of a batch; default: 64")
    training.add_argument(
        "--mini-batch-size", type=whole(), default=32, metavar="N", help="texts embedded at a time; default: 32"
    )
    training.add_argument("--learning-rate", type=positive, default=2e-5, help="default: 2e-5")
    training.add_argument("--temperature", type=positive, default=0.02, help="of all losses; default: 0.02")
    training.add_argument("--bf16", action="store_true", help="train in bfloat16")
    reranker = parser.add_argument_group("reranker")
    reranker.add_argument("--margin", type=float, default=0.05, help="of the filter; default: 0.05")
    add_scoring(reranker)
    nearest = parser.add_argument_group("nearest pairs")
    nearest.add_argument(
        "--candidates",
        type=_candidates,
        default=("all",),
        metavar="MODES",
        help="pairs that the filter has scored: all, nearest, or both with a comma; default: all",
    )
    nearest.add_argument(
        "--preselector",
        metavar="DIR|NAME|HOST:PORT",
        help="small SentenceTransformer, or served bi-encoder, that chooses the nearest pairs",
    )
    nearest.add_argument(
        "--per-anchor",
        type=_per_anchor,
        metavar="K",
        help='pairs an anchor that the preselector chooses, or "auto": as many as are scored while a step trains; '
        "default: auto",
    )
    nearest.add_argument(
        "--top-p",
        type=fraction,
        metavar="P",
        help="share of each anchor's softmax denominator that pairs with a score hold, such as 0.999; default: the "
        "preselector's pairs alone",
    )


def run(options: argparse.Namespace) -> int:
    """Train, evaluate and print the report.

    Args:
        options: The parsed arguments, with the parser as ``parser``.

    Returns:
        0 after a report, 1 after a failure. Wrong arguments exit with 2.
    """
    parser: argparse.ArgumentParser = options.parser
    _check_nearest(parser, options)
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


def _check_nearest(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    given = [name for name in ("preselector", "per_anchor", "top_p") if getattr(options, name) is not None]
    if "nearest" not in options.candidates:
        if given:
            parser.error(f"--{given[0].replace('_', '-')} goes with --candidates nearest, or all,nearest")
    elif options.preselector is None and options.top_p is None:
        parser.error("--candidates nearest needs --preselector, or --top-p")
    elif options.preselector is None and options.per_anchor is not None:
        parser.error("--per-anchor goes with --preselector, which chooses these pairs")


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
    nearest = training.Nearest(options.preselector, options.per_anchor or "auto", options.top_p)
    evaluator = evaluator_of(held_out.read(), corpus.read() if corpus else ())
    dataset = Dataset.from_list(train)
    if len(dataset) < options.batch_size:
        raise RowsError(f"{options.train} has {len(dataset)} rows, fewer than a batch of {options.batch_size}")
    _say(f"{len(dataset):,} rows to train on; {len(evaluator.queries):,} queries, {len(evaluator.corpus):,} documents")
    files = {name: str(path and path.absolute()) for name, path in vars(options).items() if name in _FILES}
    settings = {"model": options.model, **files, **asdict(recipe)}
    with ExitStack() as resources:
        output = resources.enter_context(Output(options.output, settings, options.overwrite))
        directory = resources.enter_context(tempfile.TemporaryDirectory())
        # The settings of the nearest pairs are those of a row, so that another run may change them.
        found = {_key(row): row for row in Rows(options.output).read()} if output.written else {}
        output.use(fingerprint)
        if output.fingerprint != fingerprint:
            raise OutputError(
                f"{options.output} has results of the reranker {output.fingerprint}, and {options.address} serves "
                f"{fingerprint}: choose another name, or give --overwrite"
            )

        def keep(row: Row) -> Row:
            output.write([row])
            return row

        untrained = found.get((_UNTRAINED, 0, "null"))
        if untrained is None:
            ndcg = evaluator.by_query(SentenceTransformer(options.model))
            untrained = keep({"method": _UNTRAINED, "seed": 0, "ndcg": ndcg})
        reranking = training.Reranking(client, nearest, _preselector(options.preselector, resources))
        results = []
        for seed in range(1, options.seeds + 1):
            for method in methods_of(options.candidates):
                of_method = {"nearest": asdict(nearest)} if method in WITH_ALL_PAIRS else {}
                row = found.get(_key({"method": method, "seed": seed, **of_method}))
                if row is None:
                    _say(f"seed {seed} of {options.seeds}: {method}")
                    made = training.train(options.model, method, seed, dataset, recipe, reranking, Path(directory))
                    ndcg = evaluator.by_query(made.model)
                    result = Result(method, seed, ndcg, made.seconds, made.masked_fraction, made.scored_fraction)
                    row = keep({**asdict(result), **of_method})
                results.append(Result(**{name: value for name, value in row.items() if name != "nearest"}))
        print(report(results, untrained["ndcg"]))
    return 0


def _key(row: Row) -> tuple[str, int, str]:
    """Return what tells the trainings of one output apart: method, seed, and settings of the nearest pairs as JSON."""
    return row["method"], row["seed"], json.dumps(row.get("nearest"), sort_keys=True)


def _preselector(given: str | None, resources: ExitStack) -> Any:
    """Return a client if an address is given, and a SentenceTransformer if a directory or a name is."""
    from sentence_transformers import SentenceTransformer

    if given is None:
        return None
    if Path(given).exists() or not _is_address(given):
        try:
            return SentenceTransformer(given)
        except OSError as error:
            raise OSError(f"--preselector {given} is no address, and no model that can be loaded: {error}") from error
    client = resources.enter_context(RerankerClient(given))
    client.wait_until_ready(_READY_SECONDS)
    return client


def _is_address(text: str) -> bool:
    try:
        parse_addresses(text)
    except ValueError:
        return False
    return True


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


def _candidates(text: str) -> tuple[Candidates, ...]:
    return read_modes(text, get_args(Candidates))


def _per_anchor(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else positive(text)
