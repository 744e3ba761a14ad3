"""What is compared in one regime, in the order of the tables."""

from __future__ import annotations

from collections.abc import Mapping

from sentence_transformers import SentenceTransformer

from examples.contenders import Contender, guided, reranked, unfiltered
from loss_client.client.scores import ScoreType
from quality.plan import Guide, Plan, Regime

NO_FILTER = "no filter"

#: The scores that margins are in units of: the bi-encoder's cosine, the cross-encoder's probability.
SCORE_TYPES: dict[Guide, ScoreType] = {"bi-encoder": "raw", "cross-encoder": "probability"}


def max_length(plan: Plan, guide: Guide) -> int:
    """Tokens that a guide reads: of one text, or of query and document together."""
    return plan.tokens if guide == "bi-encoder" else plan.cross_encoder.max_length


def contenders(
    plan: Plan, regime: Regime, local: SentenceTransformer, addresses: Mapping[Guide, str]
) -> list[Contender]:
    """The trainings of a regime; they differ in their loss alone.

    ``MultipleNegativesRankingLoss`` has no place of its own: without gradient caching it computes the very numbers of
    its cached sibling.

    Args:
        plan: Sizes.
        regime: Which settings are compared.
        local: The guide of CachedGISTEmbedLoss.
        addresses: Where the guides are served.
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
                # A busy machine: the other pairs of a step come first, and they are many.
                timeout=600,
            )
            for served in regime.served
        ),
    ]
