"""Scoring: begins the steps of a loss, and takes over the steps that the data collator has begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypedDict

from loss_client.client.scores import ScoreType
from loss_client.filter.candidates import Candidates, CandidateStep
from loss_client.filter.grid import GridStep
from loss_client.filter.jobs import OneModelClient, ScoringClient
from loss_client.filter.nearest.nearest import Nearest, PerAnchor
from loss_client.filter.nearest.preselector import Preselector
from loss_client.filter.prefetch import TICKET, Ticket
from loss_client.filter.step import ContrastFilter, FilterStep
from loss_client.filter.texts import TextReader


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """Settings that a step's scores are asked for with; see ``RerankerCachedGISTEmbedLoss`` for most of them.

    Settings that lead to the same scores are equal: ``gather``, ``chunk_pairs`` and ``timeout`` are not compared.

    Attributes:
        score_type: Type of the scores that the reranker is asked for.
        gather: Whether the texts of all ranks are compared.
    """

    instruction: str | None
    max_length: int | None
    score_type: ScoreType
    candidates: Candidates
    top_p: float | None
    max_candidates: int | None
    per_anchor: PerAnchor
    contrast_anchors: bool
    contrast_positives: bool
    contrast_filter: ContrastFilter
    gather: bool = field(compare=False)
    chunk_pairs: int | None = field(compare=False)
    timeout: float | None = field(compare=False)


class _Options(TypedDict):
    instruction: str | None
    max_length: int | None
    score_type: ScoreType
    chunk_pairs: int | None
    timeout: float | None


class Scoring:
    """Begins and takes over the steps of one loss.

    Args:
        client: Client of the reranker.
        preselector: Chooses pairs a batch ahead, with ``candidates="nearest"``.
    """

    def __init__(self, client: ScoringClient, preselector: Preselector | None = None) -> None:
        self._client = client
        self._texts = TextReader()
        self._preselector = preselector
        self._nearest = Nearest(preselector)

    def begin(
        self, columns: Sequence[Sequence[str]], settings: ScoringSettings, instruction: str | None = None
    ) -> FilterStep:
        """Begin to score a batch.

        Args:
            columns: The texts by column, anchors first, then positives, then any number of negatives.
            settings: The loss's settings.
            instruction: The task in words. Default: that of the settings.

        Raises:
            ValueError: ``candidates`` is ``"nearest"``, and there is neither a preselector nor ``top_p``.
        """
        options: _Options = {
            "instruction": settings.instruction if instruction is None else instruction,
            "max_length": settings.max_length,
            "score_type": settings.score_type,
            "chunk_pairs": settings.chunk_pairs,
            "timeout": settings.timeout,
        }
        # One step has several jobs. Thresholds of one model's scores would not fit the scores of another.
        client = self._client.one_model() if isinstance(self._client, OneModelClient) else self._client
        step: FilterStep
        scored = settings.contrast_filter == "scores"
        contrast = (scored and settings.contrast_anchors, scored and settings.contrast_positives)
        if settings.candidates == "all":
            step = GridStep(columns, contrast, partial(client.stream_grid, **options))
        else:
            if self._preselector is None and settings.top_p is None:
                raise ValueError("candidates='nearest' needs a preselector or top_p.")
            ask = partial(client.stream_pairs, **options)
            preselect = partial(self._nearest.begin, per_anchor=settings.per_anchor, contrast=contrast, ask=ask)
            step = CandidateStep(columns, settings.top_p, settings.max_candidates, ask, preselect)
        step.source = self._source(settings)
        step.gathers = settings.gather
        return step

    def record(self, step: FilterStep, training: bool) -> None:
        """Measure a step that the loss has worked on, for ``per_anchor="auto"``; ``take`` came before."""
        if training:
            self._nearest.record(step.rows.sizes[step.rows.rank], step.jobs)

    def take(self, features: list[dict[str, Any]], settings: ScoringSettings, model: Any) -> FilterStep:
        """Remove texts and ticket from the features, and return the batch's step, whose scoring has begun.

        Args:
            features: The features by column.
            settings: The loss's present settings. A step that was begun with others is cancelled and begun again.
            model: The SentenceTransformer that the features are for.

        Raises:
            ValueError: The batch has fewer than two columns, columns of different lengths, or no texts.
        """
        self._nearest.take(model.training)
        ticket: Ticket | None = features[0].pop(TICKET, None) if features else None
        columns = self._texts.take(features, model)
        begun = None if ticket is None else ticket.take()
        if begun is not None and begun.source == self._source(settings) and not begun.failed():
            return begun
        if begun is not None:
            # Its settings are old, or it failed while the batch waited, say during a long evaluation, and may now work.
            begun.cancel()
        return self.begin(columns, settings, None if ticket is None else ticket.instruction)

    def _source(self, settings: ScoringSettings) -> tuple[int, ScoringSettings]:
        """Return the client and the settings, which decide a step's scores."""
        return id(self._client), settings
