"""Contenders of a regime: the losses and settings that are compared, in the order of the tables."""

from __future__ import annotations

from collections.abc import Mapping

from sentence_transformers import SentenceTransformer

from examples.contenders import Contender, guided, reranked, unfiltered
from loss_client.client.scores import ScoreType
from quality.plan import Guide, Plan, Regime

NO_FILTER = "no filter"

#: Score type of each guide, which is the unit of its margins; the bi-encoder's raw score is the cosine.
SCORE_TYPES: dict[Guide, ScoreType] = {"bi-encoder": "raw", "cross-encoder": "probability"}


def max_length(plan: Plan, guide: Guide) -> int:
    """Return the maximum tokens of a guide's input: one text (bi-encoder), or query and document (cross-encoder)."""
    return plan.tokens if guide == "bi-encoder" else plan.cross_encoder.max_length


def contenders(
    plan: Plan, regime: Regime, local: SentenceTransformer, addresses: Mapping[Guide, str]
) -> list[Contender]:
    """Make the contenders of a regime, which differ in their loss alone.

    ``MultipleNegativesRankingLoss`` is left out, because it computes the same numbers as
    ``CachedMultipleNegativesRankingLoss``.

    Args:
        plan: Sizes of the study.
        regime: Settings to compare.
        local: Guide of CachedGISTEmbedLoss.
        addresses: Address of the server of each guide.
    """
    settings = (plan.temperature, plan.mini_batch_size)
    return [
        unfiltered(NO_FILTER, *settings),
        *(
            unfiltered(
                f"hardness, {mode.replace('_', ' ')} {strength:g}",
                *settings,
                hardness_mode=mode,
                hardness_strength=strength,
            )
            for mode, strength in regime.hardness
        ),
        guided("local guide, absolute 0", local, *settings),
        *(
            reranked(
                served.name,
                addresses[served.guide],
                *settings,
                max_length=max_length(plan, served.guide),
                score_type=SCORE_TYPES[served.guide],
                margin_strategy=served.margin.strategy,
                margin=served.margin.value,
                candidates=served.candidates,
                epsilon=1e-3,
                # Long, because on a busy machine the last pairs of a step wait for all others.
                timeout=600,
            )
            for served in regime.served
        ),
    ]
