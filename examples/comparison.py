"""Run of the demo: reads data, mines hard negatives, trains with three losses, and evaluates all models alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sentence_transformers import SentenceTransformer

from examples import docstrings, intervals, prefetch, report, student, triplets
from examples.contenders import Contender, contenders
from examples.serving import reranker_server
from examples.training import ProgressReport, Recipe, train
from loss_client import RerankerClient

#: Pairs to mine for, over the pairs needed: mining finds no negative for a few pairs.
_SPARE_PAIRS = 1.03
_TRIPLETS_JUDGED = 100
_TRIPLETS_SHOWN = 3
_LINE_WIDTH_MOST = 110
_PREFETCH_STEPS = 4
_PREFETCH_BATCH = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run.

    Attributes:
        steps: Training steps of each loss.
        batch_size: Anchors of a step.
        layers: Layers of the student, 1 to 6.
        pairs: Maximum number of docstrings to read.
        mined_documents: Number of documents that are candidates for hard negatives; at least the documents of all
            training pairs are.
        queries: Maximum number of held-out queries.
        held_out_share: Share of the modules that is held out, between 0 and 1.
        temperature: Temperature of all losses.
        learning_rate: Peak learning rate of all trainings, reached after a tenth of the steps; then it falls to 0.
        mini_batch_size: Texts embedded at a time.
        seed: Seed of the split, the draw of training pairs and queries, the order of the data, and dropout.
        engine: Engine of the reranker server: ``"auto"``, ``"vllm"`` or ``"torch"``.
        reranker_url: Address of a running server to use; ``None`` starts one.
        output: Directory for results, model and log.
        packages: Packages whose docstrings are read.
    """

    steps: int
    batch_size: int
    layers: int
    pairs: int
    mined_documents: int
    queries: int
    held_out_share: float
    temperature: float
    learning_rate: float
    mini_batch_size: int
    seed: int
    engine: str
    reranker_url: str | None
    output: Path
    packages: tuple[str, ...] = docstrings.PACKAGES


class PartTimes:
    """Wall-clock times of the parts of a run.

    Args:
        began: Start of the run, on the clock of ``time.monotonic``. The first part is the time since then.
        first: Name of the first part.
    """

    def __init__(self, began: float, first: str) -> None:
        self._began = began
        self.seconds: dict[str, float] = {first: time.monotonic() - began}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to the part ``name``."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    @property
    def total(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self._began

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        return f"Seconds: {parts}; {self.total:.0f} in all."


def run(settings: Settings, console: Console, began: float) -> list[report.Result]:
    """Run the demo: print progress and results to ``console``, and write files to ``settings.output``.

    Args:
        settings: Settings of the run.
        console: Console for the output.
        began: Start of the program, on the clock of ``time.monotonic``.

    Returns:
        One result a model: the untrained student, then the contenders in the order of their training.

    Raises:
        ProcessError: The reranker server did not start.
        RerankerError: The reranker server could not be used.
        ValueError: There are too few docstrings for these settings.
    """
    times = PartTimes(began, "imports")
    settings.output.mkdir(parents=True, exist_ok=True)
    own_server = nullcontext() if settings.reranker_url else reranker_server(_log(settings), settings.engine)
    make_student = partial(student.load_student, settings.layers)
    # The server loads its model while docstrings are read.
    with own_server as server:
        with times.part("data and server"):
            if server is not None:
                console.print(f"Starting the reranker server (its log: {_log(settings)})")
            split = _read(settings, console)
            evaluator = student.retrieval_evaluator(split.held_out, settings.queries, settings.seed)
            address = settings.reranker_url or (server.wait_ready() if server is not None else "")
            console.print(f"The reranker at {address} is ready")
        with times.part("mining"):
            mined = _mine(settings, split.train, console)
        with times.part("triplets"):
            share_above = _show_triplets(mined, address, console)

        with times.part("evaluation"):
            untrained, _ = _evaluate("untrained student", make_student(), evaluator)
        results = [untrained]
        baseline, baseline_by_query = "", []
        for contender in contenders(address, settings.temperature, settings.mini_batch_size):
            with times.part("trainings"):
                trained, result = _train(settings, contender, make_student, mined, console)
            with times.part("evaluation"):
                found, by_query = _evaluate(contender.name, trained, evaluator)
            result = replace(result, ndcg=found.ndcg, mrr=found.mrr)
            if baseline:
                result = replace(result, gain=intervals.paired_difference(by_query, baseline_by_query))
            else:
                baseline, baseline_by_query = contender.name, by_query
            results.append(result)
    with times.part("prefetch"):
        recipe = Recipe(
            min(_PREFETCH_STEPS, settings.steps),
            min(_PREFETCH_BATCH, settings.batch_size),
            settings.learning_rate,
            settings.seed,
            # AdamW's update of the embedding table would take longer than the rest of so small a step.
            {"optim": "sgd"},
        )
        steps = prefetch.measure(make_student, mined, recipe, settings.output)

    queries = len(evaluator.queries)
    with times.part("report"):
        trained.save_pretrained(str(settings.output / "model"))
        report.draw(settings.output / "comparison.png", results, baseline, queries)
    report.write_results(
        settings.output / "results.json",
        results,
        {
            "settings": {**asdict(settings), "output": str(settings.output)},
            "train_pairs": len(split.train),
            "train_pairs_repeated": docstrings.repeated_share(split.train),
            "held_out_pairs": len(split.held_out),
            "queries": queries,
            "documents": len(evaluator.corpus),
            "triplets": len(mined),
            "mined_negatives_above_positive": share_above,
            "prefetch": asdict(steps),
            "seconds": times.seconds,
        },
    )
    console.print(report.table(results, baseline, queries))
    console.print(report.verdict(results, baseline, queries))
    console.print(_cache_note(results[-1], sharing=server is not None))
    console.print(str(steps))
    console.print(
        f"The model of {results[-1].name!r} is saved with its card. This line loads it:\n"
        f'  model = SentenceTransformer("{settings.output / "model"}")'
    )
    console.print(f"Results are in {settings.output}/: results.json, comparison.png, model/. {times}")
    return results


def _log(settings: Settings) -> Path:
    return settings.output / "server.log"


def _read(settings: Settings, console: Console) -> docstrings.Split:
    console.print("Reading the docstrings of installed packages")
    pairs = docstrings.collect(settings.pairs, settings.packages)
    split = docstrings.split_by_module(pairs, settings.held_out_share, settings.seed)
    console.print(
        f"  {len(pairs):,} pairs; {len(split.train):,} to train on, of which "
        f"{docstrings.repeated_share(split.train):.1%} share a text with another pair; {len(split.held_out):,} in "
        "held-out modules"
    )
    if len(split.train) < 2 * settings.batch_size or not split.held_out:
        raise ValueError(
            f"{len(split.train)} pairs to train on and {len(split.held_out)} held-out pairs are too few: at least "
            f"{2 * settings.batch_size} (two batches) and 1 are needed. Increase --pairs or decrease --batch-size"
        )
    return split


def _mine(settings: Settings, train: Sequence[docstrings.Pair], console: Console) -> Dataset:
    drawn = list(train)
    random.Random(settings.seed).shuffle(drawn)
    wanted = int(settings.steps * settings.batch_size * _SPARE_PAIRS) + 1
    chosen, others = drawn[:wanted], drawn[wanted : max(wanted, settings.mined_documents)]
    console.print(
        f"Mining a hard negative for each of {len(chosen):,} pairs among {len(chosen) + len(others):,} documents"
    )
    # With the server's default model, so that miner and reranker have the same weights.
    mined, _ = student.mine_triplets(chosen, others, student.load_minilm())
    return mined


def _show_triplets(mined: Dataset, address: str, console: Console) -> float:
    """Print the triplets whose negative leads by most; return the share of negatives that score above the positive."""
    with RerankerClient(address) as client:
        judged = triplets.judge(mined, client, _TRIPLETS_JUDGED, student.MAX_TOKENS)
    share = sum(one.lead > 0 for one in judged) / len(judged)
    console.print(f"  The reranker scores {share:.0%} of {len(judged)} mined negatives above the positive, such as:")
    for one in triplets.striking(judged, _TRIPLETS_SHOWN):
        console.print()
        for line in triplets.lines(one, min(console.width, _LINE_WIDTH_MOST)):
            console.print(line, markup=False)
    console.print()
    return share


def _train(
    settings: Settings,
    contender: Contender,
    make_student: Callable[[], SentenceTransformer],
    mined: Dataset,
    console: Console,
) -> tuple[SentenceTransformer, report.Result]:
    """Train a new student with a progress bar; the result lacks the evaluation."""
    recipe = Recipe(settings.steps, settings.batch_size, settings.learning_rate, settings.seed, steps_between_logs=1)
    columns = (
        TextColumn("  {task.description:21}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(contender.name, total=settings.steps, figures="")

        def show(now: ProgressReport) -> None:
            progress.update(task, completed=now.step, figures=_figures(now))

        done = train(contender, make_student, mined, recipe, settings.output, show)
    return done.model, report.Result(
        contender.name, contender.loss, 0.0, 0.0, done.step_seconds, done.counts, done.losses
    )


def _figures(now: ProgressReport) -> str:
    """Return loss, masked share and seconds waited, in at most 36 characters."""
    if now.masked_fraction is None or now.wait_seconds is None:
        return f"loss {now.loss:.2f}"
    return f"loss {now.loss:.2f} masked {now.masked_fraction:.1%} waited {now.wait_seconds:.2f} s"


def _evaluate(
    name: str, model: SentenceTransformer, evaluator: student.RetrievalEvaluator
) -> tuple[report.Result, list[float]]:
    """Evaluate a model; return the result and the nDCG@10 of each query."""
    found = evaluator.means(model)
    return report.Result(name=name, loss="", ndcg=found["ndcg"], mrr=found["mrr"]), list(evaluator.ndcg_by_query)


def _cache_note(last: report.Result, sharing: bool) -> str:
    """Say how many of the last training's scores the service had in its cache, and that the server shares the cores."""
    counts = last.counts
    shared = " The server uses this machine's cores too, which makes the steps before longer." if sharing else ""
    return (
        f"{last.name} trains on the same batches as the training before: the service had "
        f"{counts.pairs_cached / max(counts.pairs_scored, 1):.0%} of its scores in its cache.{shared}"
    )
