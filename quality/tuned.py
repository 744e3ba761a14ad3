"""Tuned bi-encoder guide: all six layers of all-MiniLM-L6-v2, trained on the part of the data set aside for guides.

It stands for the model that a team has already trained on its own data, and wants to make smaller. It sees the same
pairs as the cross-encoder, and scores a batch in the time of a few embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import set_seed

from examples.docstrings import Pair
from quality import guide_training


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the tuned bi-encoder's training, which is one epoch.

    Attributes:
        pairs: Maximum number of training pairs from each data set.
        batch_size: Pairs of a step.
        learning_rate: Peak learning rate.
        temperature: Temperature of the loss.
    """

    pairs: int
    batch_size: int
    learning_rate: float
    temperature: float


def make(pairs: Sequence[Pair], recipe: Recipe, model: SentenceTransformer, output: Path) -> list[float]:
    """Train ``model`` on ``pairs`` with in-batch negatives, and save it in ``output``.

    Returns:
        The mean loss of every 25 steps.
    """
    dataset = Dataset.from_dict({"anchor": [pair.summary for pair in pairs], "positive": [pair.body for pair in pairs]})
    set_seed(0)
    arguments = SentenceTransformerTrainingArguments(
        **guide_training.arguments(output, recipe.batch_size, recipe.learning_rate),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / recipe.temperature)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    return guide_training.train(trainer, output)
