"""Training on several devices or machines: each rank scores its own anchors with the documents of all ranks.

Start a reranker server with ``make serve``, then run::

    torchrun --nproc-per-node 2 -m examples.train_distributed 127.0.0.1:50051

With several servers (one for each GPU that scores), give their addresses separated by commas; the jobs of all ranks are
spread over the servers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformerTrainingArguments

from examples.docstrings import collect
from examples.student import load_student
from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer


def train(rerankers: list[str], output: str, steps: int = 20, batch_size: int = 16, pairs: int = 4096) -> None:
    """Train the demo's student on all ranks and save it in the directory ``output``.

    Args:
        rerankers: Addresses of servers that all serve the same model.
        output: Directory for the model.
        steps: Training steps.
        batch_size: Pairs of a step on one rank; the documents of all ranks are candidates for every anchor.
        pairs: Number of pairs to train on.
    """
    texts = collect(pairs, packages=["stdlib"])
    dataset = Dataset.from_dict({"anchor": [one.summary for one in texts], "positive": [one.body for one in texts]})
    model = load_student()
    args = SentenceTransformerTrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-4,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    loss = RerankerCachedGISTEmbedLoss(model, rerankers, gather_across_devices=True)
    trainer = RerankerTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with a running server."""
    parser = argparse.ArgumentParser(prog="python -m examples.train_distributed", description=__doc__)
    parser.add_argument("rerankers", help="addresses of servers, separated by commas")
    parser.add_argument(
        "--output",
        default="build/trained-distributed",
        metavar="DIR",
        help="directory for the model; default: build/trained-distributed",
    )
    parser.add_argument("--tiny", action="store_true", help="train for two steps of four pairs a rank")
    options = parser.parse_args(arguments)
    steps, batch_size, pairs = (2, 4, 64) if options.tiny else (20, 16, 4096)
    train(options.rerankers.split(","), options.output, steps, batch_size, pairs)


if __name__ == "__main__":
    main()
