"""Plan of the study: compared settings and sizes."""

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
    """Margin of the loss; in units of cosine for the bi-encoder, of probability for the cross-encoder."""

    strategy: MarginStrategy
    value: float

    def __str__(self) -> str:
        return f"{self.strategy} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Served:
    """Settings of one contender with ``RerankerCachedGISTEmbedLoss``."""

    guide: Guide
    margin: Margin
    candidates: Literal["all", "mass"] = "all"

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.guide}, {self.margin}" + (", mass" if self.candidates == "mass" else "")


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to make batches, with the settings that are compared on them.

    Attributes:
        name: Name in the tables.
        batching: ``"mined"``: random anchors, each with a mined hard negative. ``"related"``: pairs from the same or
            neighbouring files of one package. ``"random"``: random pairs.
        batch_size: Anchors of a batch.
        steps: Training steps, one batch each.
        pool: Number of batches that are made; each seed draws its steps from them.
        hardness: Compared hardness modes of CachedMultipleNegativesRankingLoss, with their strengths.
        served: Compared settings of RerankerCachedGISTEmbedLoss.
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
    """All settings of the study.

    Attributes:
        sources: Names of the data sets.
        packages: Packages from which the data sets are read.
        pairs: Maximum number of pairs of each data set.
        guide_share: Share of the modules that train the cross-encoder, between 0 and 1.
        held_out_share: Share of the other modules that is held out for evaluation, between 0 and 1.
        queries: Maximum number of queries in the evaluation of the students.
        guide_queries: Maximum number of queries in the evaluation of the guides.
        seeds: Seeds of the trainings.
        regimes: Ways to make batches.
        layers: Layers of the student.
        tokens: Maximum tokens of a text, for student and bi-encoder.
        learning_rate: Peak learning rate of all trainings.
        temperature: Temperature of all losses.
        mini_batch_size: Texts embedded at a time.
        cross_encoder: Training settings of the cross-encoder.
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
        """Digest of all settings that a result depends on; seeds and the compared settings are left out."""
        regimes = [replace(regime, hardness=(), served=(), measured=()) for regime in self.regimes]
        same = asdict(replace(self, seeds=(), regimes=tuple(regimes)))
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


#: Margins whose filter is measured on the pools; some of them are also used in training.
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
            # Without the cross-encoder: even with "mass", half of the pairs are scored at this temperature, and that
            # takes too long on a CPU.
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
    """Make a tiny plan with one data set and one seed, which tests that everything runs; its results mean nothing."""

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
