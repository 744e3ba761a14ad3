"""Run of the demo: reads data, mines hard negatives, trains with three losses, and evaluates all models alike."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from examples import docstrings, report, student
from examples.contenders import Contender, contenders
from examples.serving import reranker_server
from examples.training import Recipe, train

#: Pairs to mine for, over the pairs needed: mining finds no negative for a few pairs.
_SPARE_PAIRS = 1.03


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run.

    Attributes:
        steps: Training steps of each loss.
        batch_size: Anchors of a step.
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


def run(settings: Settings, console: Console) -> list[report.Result]:
    """Run the demo: print progress and the table to ``console``, and write files to ``settings.output``.

    Returns:
        One result a model: the untrained student, then the contenders in the order of their training.

    Raises:
        ProcessError: The reranker server did not start.
        RerankerError: The reranker server could not be used.
        ValueError: There are too few docstrings for these settings.
    """
    began = time.monotonic()
    settings.output.mkdir(parents=True, exist_ok=True)
    own_server = nullcontext() if settings.reranker_url else reranker_server(_log(settings), settings.engine)
    # The server loads its model while docstrings are read.
    with own_server as server:
        if server is not None:
            console.print(f"Starting the reranker server (its log: {_log(settings)})")
        split = _read(settings, console)
        evaluator = student.retrieval_evaluator(split.held_out, settings.queries, settings.seed)
        queries = len(evaluator.queries)
        address = settings.reranker_url or (server.wait_ready() if server is not None else "")
        console.print(f"The reranker at {address} is ready")

        # The server's default model, so that guide and reranker have the same weights.
        guide = student.load_minilm()
        triplets, share_above = _mine(settings, split.train, guide, console)

        results = [_evaluate("untrained student", student.load_student(), evaluator, console)]
        trained: SentenceTransformer | None = None
        for contender in contenders(guide, address, settings.temperature, settings.mini_batch_size):
            trained, result = _train(settings, contender, triplets, evaluator, console)
            results.append(result)
        reference = _evaluate("the guide itself", guide, evaluator, console)
    if trained is not None:
        trained.save_pretrained(str(settings.output / "model"))

    seconds = time.monotonic() - began
    report.write_results(
        settings.output / "results.json",
        [*results, reference],
        {
            "settings": {**asdict(settings), "output": str(settings.output)},
            "train_pairs": len(split.train),
            "train_pairs_repeated": docstrings.repeated_share(split.train),
            "held_out_pairs": len(split.held_out),
            "queries": queries,
            "documents": len(evaluator.corpus),
            "triplets": len(triplets),
            "mined_negatives_above_positive": share_above,
            "seconds": seconds,
        },
    )
    report.draw(settings.output / "comparison.png", [*results, reference], queries)
    console.print(report.table([*results, reference], queries))
    console.print(report.verdict(results, queries))
    waited = results[-1].counts.seconds_waited / settings.steps
    sharing = "" if server is None else ". Its steps are slower because the server uses this machine's cores too"
    console.print(f"{results[-1].loss} waited {waited:.2f} s a step for scores{sharing}.")
    console.print(
        f"Finished after {seconds / 60:.1f} minutes. Results are in {settings.output}/: results.json, "
        "comparison.png, model/."
    )
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


def _mine(
    settings: Settings, train: Sequence[docstrings.Pair], miner: SentenceTransformer, console: Console
) -> tuple[Dataset, float]:
    drawn = list(train)
    random.Random(settings.seed).shuffle(drawn)
    wanted = int(settings.steps * settings.batch_size * _SPARE_PAIRS) + 1
    chosen, others = drawn[:wanted], drawn[wanted : max(wanted, settings.mined_documents)]
    console.print(
        f"Mining a hard negative for each of {len(chosen):,} pairs among {len(chosen) + len(others):,} documents"
    )
    triplets, share_above = student.mine_triplets(chosen, others, miner)
    console.print(f"  {share_above:.0%} of the {len(triplets):,} mined negatives score higher than the positive")
    return triplets, share_above


def _train(
    settings: Settings,
    contender: Contender,
    triplets: Dataset,
    evaluator: InformationRetrievalEvaluator,
    console: Console,
) -> tuple[SentenceTransformer, report.Result]:
    """Train and evaluate a new student."""
    console.print(
        f"Training with {contender.loss} ({contender.name}): {settings.steps} steps of {settings.batch_size} triplets"
    )
    recipe = Recipe(settings.steps, settings.batch_size, settings.learning_rate, settings.seed)
    done = train(contender, student.load_student, triplets, recipe, settings.output, console.print)
    found = _evaluate(contender.name, done.model, evaluator, console)
    return done.model, replace(
        found, loss=contender.loss, step_seconds=done.step_seconds, counts=done.counts, losses=done.losses
    )


def _evaluate(
    name: str, model: SentenceTransformer, evaluator: InformationRetrievalEvaluator, console: Console
) -> report.Result:
    found = evaluator(model)
    ndcg, mrr = (found[f"{evaluator.name}_cosine_{measure}@10"] for measure in ("ndcg", "mrr"))
    console.print(f"  {name}: nDCG@10 {ndcg:.3f}, MRR@10 {mrr:.3f}")
    return report.Result(name=name, loss="", ndcg=ndcg, mrr=mrr)
