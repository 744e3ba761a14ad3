"""Contenders: makes the losses of the plan's settings, and the labels of the one loss that needs labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from torch import Tensor

from examples.contenders import Contender, FilterCounts, guided, reranked, unfiltered
from loss_client import Distillation
from loss_client.client.scores import ScoreType
from loss_client.filter.calibration import entropy_sums, temperature_of
from loss_client.filter.contrast import HardnessMode
from loss_client.filter.jobs import ScoringClient
from quality.plan import Entrant, Guide, LocalGuide, OwnDocuments, Plan, Served, Unfiltered

#: Score type of each guide, which is the unit of its margins; a bi-encoder's raw score is the cosine.
SCORE_TYPES: dict[Guide, ScoreType] = {
    "bi-encoder": "raw",
    "tuned bi-encoder": "raw",
    "cross-encoder": "probability",
    "mean": "raw",
}

# A negative is masked if it scores above the positive's score less the margin: with this one, all are.
_MASKS_ALL = 1e6

ScorePairs = Callable[[list[tuple[str, str]]], NDArray[np.float32]]
"""Function that returns the raw scores of (query, document) pairs, shape ``(pairs,)``."""


def max_length(plan: Plan, guide: Guide) -> int:
    """Return the maximum tokens of a guide's input: query and document together (cross-encoder), or one text."""
    return plan.cross_encoder.max_length if guide == "cross-encoder" else plan.tokens


def make(
    plan: Plan,
    entrant: Entrant,
    local: SentenceTransformer,
    guides: Mapping[Guide, str | ScoringClient],
    dataset: Dataset | None = None,
) -> Contender:
    """Make a contender; contenders differ in their loss alone.

    ``MultipleNegativesRankingLoss`` is not among them, because it computes the same numbers as
    ``CachedMultipleNegativesRankingLoss``.

    Args:
        plan: Sizes of the study.
        entrant: Settings of the contender.
        local: Guide of CachedGISTEmbedLoss, and preselector of ``candidates="nearest"``.
        guides: Address or client of each guide.
        dataset: The training data. Only ``OwnDocuments`` needs it, with the labels of :func:`labelled`.
    """
    settings = (plan.temperature, plan.mini_batch_size)
    match entrant:
        case Unfiltered(hardness):
            return unfiltered(entrant.name, *settings, **_hardness_options(hardness))
        case LocalGuide():
            return guided(entrant.name, local, *settings)
        case OwnDocuments():
            assert dataset is not None
            return own_documents(entrant.name, plan.temperature, np.asarray(dataset["label"][:], dtype=np.float32))
        case Served():
            options = served_options(plan, entrant)
            if entrant.candidates == "nearest":
                options |= {"preselector": local, "per_anchor": entrant.per_anchor}
            return reranked(entrant.name, guides[entrant.guide], *settings, timeout=600, **options)


def served_options(plan: Plan, served: Served) -> dict[str, Any]:
    """Return the arguments of ``RerankerCachedGISTEmbedLoss`` for settings of the plan."""
    margin = served.margin
    return {
        "reranker_max_length": max_length(plan, served.guide),
        "score_type": "raw" if margin is None else SCORE_TYPES[served.guide],
        "margin_strategy": "absolute" if margin is None else margin.strategy,
        "margin": _MASKS_ALL if margin is None else margin.value,
        "candidates": served.candidates,
        "distillation": served.distillation,
        **_hardness_options(served.hardness),
    }


def _hardness_options(hardness: tuple[HardnessMode, float] | None) -> dict[str, Any]:
    return {} if hardness is None else {"hardness_mode": hardness[0], "hardness_strength": hardness[1]}


class UnscaledDistillKLDivLoss(DistillKLDivLoss):
    """``DistillKLDivLoss`` without its factor of the student's temperature squared.

    At a temperature of 0.02 the factor is 0.0004. This loss stands alone, and nothing needs to be weighed against it.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Compute the loss from the embeddings by column, each ``(batch, dim)``, and labels ``(batch, documents)``."""
        scaled: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
        return scaled / self.student_temperature**2


def own_documents(name: str, temperature: float, labels: NDArray[np.float32]) -> Contender:
    """Make a contender with ``DistillKLDivLoss`` over each anchor's own documents.

    The teacher's temperature follows the rule of this repository's loss: the mean entropy of the teacher's
    distributions is the default share of the largest possible one.

    Args:
        name: Name in the tables.
        temperature: The student's temperature.
        labels: The teacher's raw scores, shape ``(anchors, documents)``, two documents or more.
    """
    teacher = temperature_of(entropy_sums(labels), Distillation().entropy)
    return Contender(
        name,
        "DistillKLDivLoss",
        lambda student: UnscaledDistillKLDivLoss(
            student, student_temperature=temperature, teacher_temperature=teacher or 1.0
        ),
        lambda loss: FilterCounts(pairs_scored=labels.size),
    )


def labelled(dataset: Dataset, score_pairs: ScorePairs) -> Dataset:
    """Add the column ``label``: for each row the scores of its anchor with each of its documents, in their order."""
    anchors, *columns = (dataset[name][:] for name in dataset.column_names)
    scores = [score_pairs(list(zip(anchors, column, strict=True))) for column in columns]
    return dataset.add_column("label", np.stack(scores, axis=1).tolist())
