"""Shortest complete training program: trains on docstrings of the standard library with a running reranker server.

Start the server with ``make serve``, then run ``python -m examples.train 127.0.0.1:50051``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformerTrainingArguments

from examples.docstrings import collect
from examples.student import load_student
from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer


def train(reranker: str, output: str, steps: int = 20, batch_size: int = 32, instruction: str | None = None) -> None:
    """Train the demo's student with the reranker at this address and save it in the directory ``output``.

    Args:
        reranker: Address of the server, such as ``"127.0.0.1:50051"``.
        output: Directory for the model.
        steps: Training steps.
        batch_size: Pairs of a step.
        instruction: The task in words, for a reranker that takes one. Default: the reranker's own.
    """
    pairs = collect(steps * batch_size, packages=["stdlib"])
    dataset = Dataset.from_dict({"anchor": [one.summary for one in pairs], "positive": [one.body for one in pairs]})
    model = load_student()
    args = SentenceTransformerTrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-4, report_to="none",
        logging_steps=5,
    )  # fmt: skip
    loss = RerankerCachedGISTEmbedLoss(model, reranker, instruction=instruction)
    trainer = RerankerTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
    trainer.train()
    model.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with a running server."""
    parser = argparse.ArgumentParser(prog="python -m examples.train", description=__doc__)
    parser.add_argument("reranker", help="address of the server, such as 127.0.0.1:50051")
    parser.add_argument(
        "--output", default="build/trained", metavar="DIR", help="directory for the model; default: build/trained"
    )
    parser.add_argument("--tiny", action="store_true", help="train for two steps of four pairs")
    options = parser.parse_args(arguments)
    steps, batch_size = (2, 4) if options.tiny else (20, 32)
    train(options.reranker, options.output, steps, batch_size)


if __name__ == "__main__":
    main()
