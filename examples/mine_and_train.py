"""Mining plus training: hard negatives without a margin, and the loss that masks the false ones among them.

A margin drops the candidates near the positive: false negatives, and the hardest true ones. Here the nearest documents
are taken without a margin, which needs no reranker. While the model trains, the reranker scores them together with the
other documents of the batch, and the loss masks those that answer the query.

Start the server with ``make serve``, then run ``python -m examples.mine_and_train 127.0.0.1:50051``. For a loss without
a filter, :mod:`examples.mine_hard_negatives` mines with the reranker and a margin.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.util import mine_hard_negatives

from examples.docstrings import collect
from examples.student import load_student
from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer


def mine(path: Path, pairs: int, negatives: int = 2) -> None:
    """Mine the nearest documents of each anchor, and write anchor, positive and negatives to a file of JSON lines.

    Args:
        path: The file.
        pairs: Number of pairs.
        negatives: Negatives of a pair.
    """
    texts = collect(pairs, packages=["stdlib"])
    dataset = Dataset.from_dict({"anchor": [one.summary for one in texts], "positive": [one.body for one in texts]})
    mined = mine_hard_negatives(
        dataset, load_student(), num_negatives=negatives, output_format="n-tuple", verbose=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    mined.to_json(path)


def train(path: Path, reranker: str, output: str, steps: int = 20, batch_size: int = 32) -> None:
    """Train the demo's student on a mined file, and save it in the directory ``output``."""
    model = load_student()
    args = SentenceTransformerTrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-4, report_to="none",
        logging_steps=5,
    )  # fmt: skip
    loss = RerankerCachedGISTEmbedLoss(model, reranker)
    dataset = Dataset.from_json(str(path))
    trainer = RerankerTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
    trainer.train()
    model.save_pretrained(output)


def main(arguments: list[str] | None = None) -> None:
    """Mine, then train on the mined file."""
    parser = argparse.ArgumentParser(prog="python -m examples.mine_and_train", description=__doc__)
    parser.add_argument("reranker", help="address of the server, such as 127.0.0.1:50051")
    parser.add_argument("--output", type=Path, default=Path("build/mined"), help="directory for triplets and model")
    parser.add_argument("--tiny", action="store_true", help="mine for 16 pairs, and train for two steps of four pairs")
    options = parser.parse_args(arguments)
    pairs, steps, batch_size = (16, 2, 4) if options.tiny else (640, 20, 32)
    mined = options.output / "mined.jsonl"
    mine(mined, pairs)
    train(mined, options.reranker, str(options.output / "model"), steps, batch_size)


if __name__ == "__main__":
    main()
