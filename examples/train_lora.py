"""Training of a LoRA adapter: the student's own weights stay fixed, and a few thousand new ones are trained.

Start the server with ``make serve``, then run ``python -m examples.train_lora 127.0.0.1:50051``. It needs peft
(``pip install peft``). The loss embeds each mini-batch twice, with the same dropout both times, in the adapter as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import Dataset  # type: ignore[import-untyped]
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformerTrainingArguments

from examples.docstrings import collect
from examples.student import load_student
from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer


def train(reranker: str, output: str, steps: int = 20, batch_size: int = 32) -> None:
    """Train an adapter with the reranker at this address, and save it in the directory ``output``.

    ``SentenceTransformer(base)`` and ``load_adapter(output)`` load it again.
    """
    pairs = collect(steps * batch_size, packages=["stdlib"])
    dataset = Dataset.from_dict({"anchor": [one.summary for one in pairs], "positive": [one.body for one in pairs]})
    model = load_student()
    model.add_adapter(
        LoraConfig(
            TaskType.FEATURE_EXTRACTION, r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["query", "value"]
        )
    )
    # Adapters want a learning rate ten times as high as all weights do.
    args = SentenceTransformerTrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-3, report_to="none",
        logging_steps=5, save_strategy="no",
    )  # fmt: skip
    loss = RerankerCachedGISTEmbedLoss(model, reranker)
    trainer = RerankerTrainer(model=model, args=args, train_dataset=dataset, loss=loss)
    trainer.train()
    model.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with a running server."""
    parser = argparse.ArgumentParser(prog="python -m examples.train_lora", description=__doc__)
    parser.add_argument("reranker", help="address of the server, such as 127.0.0.1:50051")
    parser.add_argument(
        "--output",
        default="build/trained-lora",
        metavar="DIR",
        help="directory for the model; default: build/trained-lora",
    )
    parser.add_argument("--tiny", action="store_true", help="train for two steps of four pairs")
    options = parser.parse_args(arguments)
    steps, batch_size = (2, 4) if options.tiny else (20, 32)
    train(options.reranker, options.output, steps, batch_size)


if __name__ == "__main__":
    main()
