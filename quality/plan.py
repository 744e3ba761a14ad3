"""What the study compares, and how large it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from examples.docstrings import PACKAGES, STANDARD_LIBRARY
from loss_client.filter.masking import MarginStrategy
from quality.cross_encoder import Recipe as CrossEncoderRecipe

Guide = Literal["bi-encoder", "cross-encoder"]
Batching = Literal["mined", "related", "random"]


@dataclass(frozen=True, slots=True)
class Margin:
    """A margin as the loss takes it; the bi-encoder's are in units of cosine, the cross-encoder's of probability."""

    strategy: MarginStrategy
    value: float

    def __str__(self) -> str:
        return f"{self.strategy} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Served:
    """One setting of ``RerankerCachedGISTEmbedLoss``."""

    guide: Guide
    margin: Margin
    candidates: Literal["all", "mass"] = "all"

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"{self.guide}, {self.margin}" + (", mass" if self.candidates == "mass" else "")


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to make batches, and what is compared on them.

    Attributes:
        name: What the tables call it.
        batching: ``"mined"``: random anchors, each with a mined hard negative. ``"related"``: neighbours, by file, of
            one package. ``"random"``: random pairs.
        batch_size: Anchors of a batch.
        steps: Training steps, one batch each.
        pool: Batches that are made; each seed draws its steps from them.
        hardness: Modes of CachedMultipleNegativesRankingLoss that are compared, with their strengths.
        served: Settings of RerankerCachedGISTEmbedLoss that are compared.
        measured: Guides whose filter is measured on all pairs of the pool.
    """

    name: str
    batching: Batching
    batch_size: int
    steps: int
    pool: int
    hardness: tuple[tuple[str, float], ...]
    served: tuple[Served, ...]
    measured: tuple[Guide, ...] = ("bi-encoder", "cross-encoder")


@dataclass(frozen=True, slots=True)
class Plan:
    """The study.

    Attributes:
        sources: Names of the data sets.
        packages: Where they are read.
        pairs: Pairs of each data set that are read, at most.
        guide_share: Share of the modules for the cross-encoder.
        held_out_share: Share of the other modules for the examination.
        queries: Queries of the examination, at most.
        guide_queries: Queries of the guides' own examination, at most.
        seeds: Of the trainings.
        regimes: Ways to make batches.
        layers: Of the student.
        tokens: Of one text that student and bi-encoder see.
        learning_rate: Peak of all trainings.
        temperature: Of all losses.
        mini_batch_size: Texts embedded at a time.
        cross_encoder: How it is made.
    """

    sources: tuple[str, ...]
    packages: tuple[str, ...]
    pairs: int
    guide_share: float
    held_out_share: float
    queries: int
    guide_queries: int
    seeds: tuple[int, ...]
    regimes: tuple[Regime, ...]
    layers: int
    tokens: int
    learning_rate: float
    temperature: float
    mini_batch_size: int
    cross_encoder: CrossEncoderRecipe

    @property
    def digest(self) -> str:
        """Changes with everything that a result depends on, save which seeds and contenders are asked for."""
        regimes = [replace(regime, hardness=(), served=(), measured=()) for regime in self.regimes]
        same = asdict(replace(self, seeds=(), regimes=tuple(regimes)))
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


#: Measured on the pools, whether trained with or not.
MARGINS: dict[Guide, tuple[Margin, ...]] = {
    guide: (
        *(Margin("absolute", value) for value in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)),
        *(Margin("relative", value) for value in (0.05, 0.1, 0.2, 0.4)),
    )
    for guide in ("bi-encoder", "cross-encoder")
}


def _served(guide: Guide, *margins: tuple[MarginStrategy, float]) -> tuple[Served, ...]:
    return tuple(Served(guide, Margin(*margin)) for margin in margins)


_MASS = Served("cross-encoder", Margin("absolute", 0.05), "mass")
_IN_BATCH = ("in_batch_negatives", 9.0)

FULL = Plan(
    sources=("docstrings", "code"),
    packages=PACKAGES,
    pairs=12_000,
    guide_share=0.4,
    held_out_share=0.15,
    queries=1_000,
    guide_queries=192,
    seeds=(0, 1, 2),
    regimes=(
        Regime(
            "hard negatives",
            "mined",
            batch_size=24,
            steps=16,
            pool=20,
            hardness=(_IN_BATCH, ("hard_negatives", 5.0)),
            served=(
                *_served("bi-encoder", ("absolute", 0.05), ("relative", 0.1)),
                *_served("cross-encoder", ("absolute", 0.0), ("absolute", 0.05), ("absolute", 0.2), ("relative", 0.1)),
                _MASS,
            ),
        ),
        Regime(
            "related texts",
            "related",
            batch_size=32,
            steps=16,
            pool=20,
            hardness=(_IN_BATCH,),
            served=(
                *_served("bi-encoder", ("absolute", 0.05)),
                *_served("cross-encoder", ("absolute", 0.05)),
                _MASS,
            ),
        ),
        Regime(
            "large batches",
            "random",
            batch_size=96,
            steps=8,
            pool=11,
            hardness=(_IN_BATCH,),
            # Even the half of the pairs that matters at this temperature is too many for the cross-encoder here.
            served=_served("bi-encoder", ("absolute", 0.05)),
            measured=("bi-encoder",),
        ),
    ),
    layers=2,
    tokens=48,
    learning_rate=3e-4,
    temperature=0.02,
    mini_batch_size=32,
    cross_encoder=CrossEncoderRecipe(pairs=1_500, hard=1, easy=2, max_length=64, batch_size=32, learning_rate=2e-4),
)


def quick() -> Plan:
    """One data set and one seed of the study, on next to nothing: what it finds means nothing."""

    first, *others = (replace(regime, batch_size=6, steps=2, pool=3) for regime in FULL.regimes)
    first = replace(first, hardness=first.hardness[:1], served=(first.served[0], first.served[-1]))
    return replace(
        FULL,
        sources=("code",),
        packages=(STANDARD_LIBRARY,),
        pairs=400,
        queries=24,
        guide_queries=6,
        seeds=(0,),
        regimes=(first, *(replace(other, hardness=(), served=other.served[-1:]) for other in others)),
        cross_encoder=replace(FULL.cross_encoder, pairs=16),
    )
