"""Trainings of the comparison: one model for each method and seed, on the same batches."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn
from transformers import PrinterCallback, set_seed

from loss_client.client.client import RerankerClient
from loss_client.client.scores import ScoreType
from loss_client.compare.methods import (
    DISTILLATION,
    HARDNESS,
    HARDNESS_STRENGTH,
    WITH_ALL_PAIRS,
    WITHOUT_RERANKER,
    Method,
)
from loss_client.filter.distillation import Distillation
from loss_client.filter.nearest.nearest import PerAnchor
from loss_client.loss import RerankerCachedGISTEmbedLoss
from loss_client.trainer import RerankerTrainer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of all trainings.

    Attributes:
        steps: Steps of a training.
        batch_size: Anchors of a batch.
        mini_batch_size: Texts embedded at a time.
        learning_rate: Peak learning rate, reached after a tenth of the steps; then it falls to 0.
        temperature: Temperature of all losses.
        bf16: Whether to train in bfloat16.
        margin: Margin of the filter, in units of ``score_type``.
        score_type: Score type of the filter.
        instruction: The task in words, for the reranker.
        max_length: Longest input of the reranker, in its tokens.
    """

    steps: int
    batch_size: int
    mini_batch_size: int
    learning_rate: float
    temperature: float
    bf16: bool
    margin: float
    score_type: ScoreType
    instruction: str | None
    max_length: int | None


@dataclass(frozen=True, slots=True)
class Nearest:
    """Settings of the methods that score the nearest pairs only; see the loss's arguments of the same names."""

    preselector: str | None
    per_anchor: PerAnchor
    top_p: float | None


@dataclass(frozen=True, slots=True)
class Reranking:
    """Clients and settings of the methods with a reranker.

    Attributes:
        client: Client of the reranker.
        nearest: Settings of the methods that score the nearest pairs only.
        preselector: Client of a served preselector, or its model; ``None`` without a preselector.
    """

    client: RerankerClient
    nearest: Nearest
    preselector: RerankerClient | SentenceTransformer | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model.

    Attributes:
        model: The model.
        seconds: Time of the training, without loading and evaluation.
        masked_fraction: Fraction of the negatives that the filter dropped; ``None`` without a filter.
        scored_fraction: Fraction of the pairs of a batch that were scored; ``None`` without a filter.
    """

    model: SentenceTransformer
    seconds: float
    masked_fraction: float | None
    scored_fraction: float | None


def train(
    name: str, method: Method, seed: int, dataset: Any, recipe: Recipe, reranking: Reranking, directory: Path
) -> Trained:
    """Train a model. Trainings with the same seed have the same batches in the same order.

    Args:
        name: Directory or hub name of the model to start from.
        method: The method.
        seed: Seed of the batches and of dropout; 1 or more, because sentence-transformers' samplers ignore 0.
        dataset: A data set with columns of text: anchor, positive and any negatives.
        recipe: Settings of the training.
        reranking: Clients and settings of the methods with a reranker.
        directory: Directory for the trainer.
    """
    set_seed(seed)
    model = SentenceTransformer(name)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=max(1, recipe.steps // 10),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        dataloader_drop_last=True,
        bf16=recipe.bf16,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    loss = _loss(method, model, recipe, reranking)
    trainer = RerankerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    seconds, masked, scored = time.monotonic() - began, None, None
    if isinstance(loss, RerankerCachedGISTEmbedLoss):
        counts = loss.statistics
        masked = counts.masked_negatives / max(counts.negatives, 1)
        scored = counts.pairs / max(counts.pairs + counts.skipped_pairs, 1)
    return Trained(model, seconds, masked, scored)


def _loss(method: Method, model: SentenceTransformer, recipe: Recipe, reranking: Reranking) -> nn.Module:
    if method in WITHOUT_RERANKER:
        hardness: dict[str, Any] = {"hardness_mode": "in_batch_negatives", "hardness_strength": HARDNESS_STRENGTH}
        unfiltered: nn.Module = CachedMultipleNegativesRankingLoss(
            model,
            scale=1 / recipe.temperature,
            mini_batch_size=recipe.mini_batch_size,
            **(hardness if method == HARDNESS else {}),
        )
        return unfiltered
    nearest: dict[str, Any] = {}
    if method in WITH_ALL_PAIRS:
        nearest = {**asdict(reranking.nearest), "preselector": reranking.preselector, "candidates": "nearest"}
    return RerankerCachedGISTEmbedLoss(
        model,
        reranking.client,
        temperature=recipe.temperature,
        mini_batch_size=recipe.mini_batch_size,
        margin=recipe.margin,
        score_type=recipe.score_type,
        instruction=recipe.instruction,
        reranker_max_length=recipe.max_length,
        distillation=Distillation() if WITH_ALL_PAIRS.get(method, method) == DISTILLATION else None,
        **nearest,
    )
