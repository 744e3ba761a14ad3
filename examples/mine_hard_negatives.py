"""Mining of hard negatives with sentence-transformers' ``mine_hard_negatives`` and a served reranker.

The nearest document other than the anchor's positive is often a false negative. So the demo's small student finds
candidates, and the reranker scores them: a candidate that scores above the positive, less a margin, is dropped. The
student is then trained for a few steps on the mined triplets.

``python -m examples.mine_hard_negatives --help`` lists the settings.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from examples.program import prepare_process, run_program
from examples.serving import reranker_server

_NEGATIVES = 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse command-line arguments; ``None`` stands for the arguments of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.mine_hard_negatives",
        description="Mines hard negatives with a reranker service and trains a small model on them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=4_000, help="maximum number of docstrings to read")
    parser.add_argument("--anchors", type=int, default=400, help="maximum number of pairs to mine negatives for")
    parser.add_argument("--candidates", type=int, default=10, help="nearest documents of an anchor to score")
    parser.add_argument(
        "--margin", type=float, default=0.05, help="drop candidates above (1 - margin) x positive score"
    )
    parser.add_argument("--steps", type=int, default=12, help="training steps")
    parser.add_argument("--batch-size", type=int, default=32, help="triplets of a step")
    parser.add_argument("--queries", type=int, default=500, help="maximum number of held-out queries")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument("--engine", choices=("auto", "vllm", "torch"), default="auto", help="engine of the server")
    parser.add_argument("--reranker-url", help="address of a running server to use, such as 127.0.0.1:50051")
    parser.add_argument("--output", type=Path, default=Path("mining-results"), help="directory for triplets and model")
    return parser.parse_args(arguments)


def mine(
    pairs: dict[str, list[str]],
    corpus: list[str],
    model: Any,
    cross_encoder: Any,
    candidates: int,
    margin: float,
    embeddings: str,
) -> Any:
    """Mine one hard negative for each pair.

    Args:
        pairs: Columns ``anchor`` and ``positive``.
        corpus: Further documents that may be negatives.
        model: Embedding model that finds candidates.
        cross_encoder: Cross-encoder that scores the candidates; ``None`` takes the nearest candidate without a score.
        candidates: Number of nearest documents that are candidates.
        margin: Candidates must score at least this share of the positive's score below the positive.
        embeddings: Directory that caches the embeddings for further calls with the same model and texts.

    Returns:
        A data set with the columns ``anchor``, ``positive`` and ``negative``. Pairs without a negative are left out.
    """
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers.util import mine_hard_negatives

    return mine_hard_negatives(
        Dataset.from_dict(pairs),
        model,
        corpus=corpus,
        cross_encoder=cross_encoder,
        relative_margin=None if cross_encoder is None else margin,
        range_max=candidates,
        num_negatives=_NEGATIVES,
        verbose=False,
        cache_folder=embeddings,
    )


def run(options: argparse.Namespace, address: str, say: Any) -> None:
    """Mine, train and evaluate; write results to ``options.output`` and pass each line of progress to ``say``.

    Raises:
        RerankerError: The service could not be used.
        ValueError: There are too few docstrings, or negatives, for these settings.
    """
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import PrinterCallback, set_seed

    from examples.docstrings import collect, split_by_module
    from examples.student import load_student, retrieval_evaluator
    from loss_client import RemoteCrossEncoder

    split = split_by_module(collect(options.pairs), held_out_share=0.1, seed=options.seed)
    drawn = random.Random(options.seed).sample(split.train, len(split.train))
    chosen, others = drawn[: options.anchors], drawn[options.anchors :]
    if len(chosen) < options.batch_size or len(drawn) <= options.candidates or not split.held_out:
        raise ValueError(
            f"{len(chosen)} anchors, {len(drawn)} docstrings to train on and {len(split.held_out)} held-out docstrings "
            f"are too few: at least {options.batch_size} (--batch-size), {options.candidates + 1} (--candidates and "
            "one more) and 1 are needed. Increase --pairs or --anchors"
        )
    pairs = {"anchor": [pair.summary for pair in chosen], "positive": [pair.body for pair in chosen]}
    say(
        f"Read {len(split.train):,} docstrings to train on. {len(chosen):,} give an anchor and its positive; the "
        f"documents of all {len(drawn):,} are candidates for negatives. {len(split.held_out):,} docstrings of other "
        "modules are held out."
    )

    set_seed(options.seed)
    model = load_student()
    corpus = [pair.body for pair in others]
    with RemoteCrossEncoder(address) as reranker, tempfile.TemporaryDirectory() as embeddings:
        nearest = mine(pairs, corpus, model, None, options.candidates, options.margin, embeddings)
        of_positive, of_negative = (
            reranker.predict(list(zip(nearest["anchor"], nearest[column], strict=True)))
            for column in ("positive", "negative")
        )
        say(
            f"Without the reranker, each negative is the nearest other document. The reranker at {address} scores "
            f"{(of_negative > of_positive).mean():.0%} of these negatives above the positive."
        )
        began = time.monotonic()
        mined = mine(pairs, corpus, model, reranker, options.candidates, options.margin, embeddings)
        seconds = time.monotonic() - began
    unscored = set(zip(nearest["anchor"], nearest["negative"], strict=True))
    kept = sum(pair in unscored for pair in zip(mined["anchor"], mined["negative"], strict=True))
    say(
        f"With the reranker, {len(mined):,} of {len(chosen):,} pairs have a negative that scores at least "
        f"{options.margin:.0%} below the positive: {kept:,} have the same negative as without the reranker, "
        f"{len(mined) - kept:,} another one. Mining took {seconds:.1f} s."
    )
    if len(mined) < options.batch_size:
        raise ValueError(
            f"{len(mined)} triplets are too few for batches of {options.batch_size}: increase --anchors or decrease "
            "--batch-size"
        )
    mined.to_json(options.output / "triplets.jsonl")

    evaluator = retrieval_evaluator(split.held_out, options.queries, options.seed)
    before = evaluator.means(model)["ndcg"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        warmup_steps=options.steps // 10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=options.seed,
    )
    loss = MultipleNegativesRankingLoss(model, scale=50.0)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=mined, loss=loss)
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    after = evaluator.means(model)["ndcg"]
    model.save_pretrained(str(options.output / "model"))
    say(
        f"{options.steps} steps of {options.batch_size} triplets took {time.monotonic() - began:.0f} s with the "
        f"evaluation. nDCG@10 on {len(evaluator.queries):,} held-out queries: {before:.3f} before, {after:.3f} after."
    )
    say(f"Results are in {options.output}/: triplets.jsonl, model/.")


def main(arguments: list[str] | None = None) -> int:
    """Run the example; see :func:`examples.program.run_program` for the exit status that is returned."""
    options = parse(arguments)
    prepare_process()
    return run_program(lambda: _run_with_server(options))


def _run_with_server(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "server.log"
    with nullcontext() if options.reranker_url else reranker_server(log, options.engine) as server:
        if server is not None:
            print(f"Starting the reranker server (its log: {log})", flush=True)
        address = options.reranker_url or (server.wait_ready() if server is not None else "")
        run(options, address, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
