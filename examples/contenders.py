"""Contenders: losses without a filter, with a local guide, and with a reranker service.

All are cached contrastive losses over the same candidates (each anchor against every positive and every mined negative
of the batch) at the same temperature, so that they differ only in what they do with a guide's scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, CachedMultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn import functional

from examples.student import MAX_TOKENS
from loss_client import Distillation, RerankerCachedGISTEmbedLoss
from loss_client.filter.jobs import ScoringClient

#: Margin of the demo's filter, in units of probability; of a bi-encoder's cosine it is 0.05.
MARGIN = 0.025


@dataclass(frozen=True, slots=True)
class FilterCounts:
    """Counts of a loss's filter over a whole training.

    Attributes:
        pairs_scored: Pairs that a guide or a reranker scored.
        negatives: Negatives of all anchors before filtering.
        masked: Negatives that the filter masked.
        wait_seconds: Seconds that training waited for scores.
        pairs_cached: Pairs of ``pairs_scored`` whose score the reranker service had in its cache.
    """

    pairs_scored: int = 0
    negatives: int = 0
    masked: int = 0
    wait_seconds: float = 0.0
    pairs_cached: int = 0


@dataclass(frozen=True, slots=True)
class Contender:
    """One loss with its settings.

    Attributes:
        name: Short name of the filter.
        loss: Name of the loss's class.
        make_loss: Makes the loss for a student.
        read_counts: Returns the counts so far of a loss that ``make_loss`` made.
    """

    name: str
    loss: str
    make_loss: Callable[[SentenceTransformer], nn.Module]
    read_counts: Callable[[nn.Module], FilterCounts]


class CountingGISTEmbedLoss(CachedGISTEmbedLoss):
    """``CachedGISTEmbedLoss`` without contrast terms and with a margin of 0, which counts the negatives that it masks.

    Args:
        model: Model to train.
        guide: Model whose cosines decide which negatives are masked.
        temperature: Divisor of the cosine similarities.
        mini_batch_size: Texts embedded at a time.
    """

    def __init__(
        self, model: SentenceTransformer, guide: SentenceTransformer, temperature: float, mini_batch_size: int
    ) -> None:
        super().__init__(
            model,
            guide,
            temperature=temperature,
            mini_batch_size=mini_batch_size,
            contrast_anchors=False,
            contrast_positives=False,
        )
        self.counts = FilterCounts()

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Count, from the guide's embeddings, the negatives that the base class masks; then compute its loss."""
        anchors, *documents = (functional.normalize(torch.cat(column), dim=-1) for column in reps_guided)
        scores = anchors @ torch.cat(documents).T  # (batch, documents)
        masked = scores > scores.diagonal().unsqueeze(1)
        self.counts = FilterCounts(
            pairs_scored=self.counts.pairs_scored + scores.numel(),
            negatives=self.counts.negatives + scores.numel() - len(anchors),
            masked=self.counts.masked + int(masked.sum()),
        )
        return super().calculate_loss(reps, reps_guided, with_backward=with_backward)


def contenders(reranker: str, temperature: float, mini_batch_size: int) -> list[Contender]:
    """Make the contenders of the demo: no filter, filter, filter and distillation.

    Args:
        reranker: Address of the reranker. Its inputs are cut to ``MAX_TOKENS`` like those of the student.
        temperature: Temperature of all losses.
        mini_batch_size: Texts embedded at a time, in all losses.
    """
    return [
        unfiltered("no filter", temperature, mini_batch_size),
        reranked("filter", reranker, temperature, mini_batch_size, MAX_TOKENS, margin=MARGIN),
        reranked(
            "filter + distillation",
            reranker,
            temperature,
            mini_batch_size,
            MAX_TOKENS,
            margin=MARGIN,
            distillation=Distillation(),
        ),
    ]


def reranked(
    name: str,
    reranker: str | ScoringClient,
    temperature: float,
    mini_batch_size: int,
    reranker_max_length: int | None,
    **options: Any,
) -> Contender:
    """Make a contender with :class:`RerankerCachedGISTEmbedLoss`; ``options`` are further arguments of it."""
    return Contender(
        name,
        "RerankerCachedGISTEmbedLoss",
        lambda student: RerankerCachedGISTEmbedLoss(
            student,
            reranker,
            temperature=temperature,
            mini_batch_size=mini_batch_size,
            reranker_max_length=reranker_max_length,
            **options,
        ),
        _reranker_counts,
    )


def guided(name: str, guide: SentenceTransformer, temperature: float, mini_batch_size: int) -> Contender:
    """Make a contender with :class:`CachedGISTEmbedLoss`, whose ``guide`` runs in the training process."""
    return Contender(
        name,
        "CachedGISTEmbedLoss",
        lambda student: CountingGISTEmbedLoss(student, guide, temperature, mini_batch_size),
        _gist_counts,
    )


def unfiltered(name: str, temperature: float, mini_batch_size: int, **options: Any) -> Contender:
    """Make a contender with :class:`CachedMultipleNegativesRankingLoss`; ``options`` are further arguments of it."""
    return Contender(
        name,
        "CachedMultipleNegativesRankingLoss",
        lambda student: CachedMultipleNegativesRankingLoss(
            student, scale=1 / temperature, mini_batch_size=mini_batch_size, **options
        ),
        lambda loss: FilterCounts(),
    )


def _gist_counts(loss: nn.Module) -> FilterCounts:
    assert isinstance(loss, CountingGISTEmbedLoss)
    return loss.counts


def _reranker_counts(loss: nn.Module) -> FilterCounts:
    assert isinstance(loss, RerankerCachedGISTEmbedLoss)
    done = loss.statistics
    return FilterCounts(done.pairs, done.negatives, done.masked_negatives, done.wait_seconds, done.cached_pairs)
