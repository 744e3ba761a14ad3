"""Plan of the study: compared settings and sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from examples.docstrings import PACKAGES, STANDARD_LIBRARY
from loss_client import Distillation
from loss_client.filter.contrast import HardnessMode
from loss_client.filter.masking import MarginStrategy
from quality.cross_encoder import Recipe as CrossEncoderRecipe
from quality.tuned import Recipe as TunedRecipe

Guide = Literal["bi-encoder", "tuned bi-encoder", "cross-encoder", "mean"]
Batching = Literal["mined", "related", "random"]


@dataclass(frozen=True, slots=True)
class Margin:
    """Margin of the loss; in units of probability for the cross-encoder, otherwise of the bi-encoder's cosine."""

    strategy: MarginStrategy
    value: float

    def __str__(self) -> str:
        return f"{self.strategy} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Unfiltered:
    """``CachedMultipleNegativesRankingLoss``.

    Attributes:
        hardness: Its hardness mode and strength; ``None`` for neither.
    """

    hardness: tuple[HardnessMode, float] | None = None

    @property
    def name(self) -> str:
        """Name in the tables."""
        return "no filter" if self.hardness is None else f"hardness, {_words(self.hardness)}"


@dataclass(frozen=True, slots=True)
class LocalGuide:
    """``CachedGISTEmbedLoss`` with the bi-encoder in the training process and margin 0."""

    @property
    def name(self) -> str:
        """Name in the tables."""
        return "local guide, absolute 0"


@dataclass(frozen=True, slots=True)
class OwnDocuments:
    """sentence-transformers' ``DistillKLDivLoss`` over each anchor's positive and mined negative.

    Attributes:
        guide: Guide whose raw scores are the labels.
    """

    guide: Guide

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.guide}, DistillKLDivLoss"


@dataclass(frozen=True, slots=True)
class Served:
    """``RerankerCachedGISTEmbedLoss``.

    Attributes:
        guide: Model of the server; ``"mean"`` averages the raw scores of tuned bi-encoder and cross-encoder.
        margin: Margin of the filter; ``None`` masks every negative, so that the contrastive term is 0 and only the
            distillation term trains.
        candidates: Pairs that are scored. The preselector of ``"nearest"`` is the bi-encoder.
        per_anchor: Preselected pairs of an anchor, with ``"nearest"``.
        distillation: The distillation term.
        hardness: Hardness mode and strength.
    """

    guide: Guide
    margin: Margin | None
    candidates: Literal["all", "nearest"] = "all"
    per_anchor: float | Literal["auto"] | None = None
    distillation: Distillation | None = None
    hardness: tuple[HardnessMode, float] | None = None

    @property
    def name(self) -> str:
        """Name in the tables; different for all settings that are compared."""
        parts = [f"{self.guide}, {self.margin or 'no contrast'}"]
        if self.candidates == "nearest":
            parts.append(f"nearest {self.per_anchor}")
        if self.distillation is not None:
            parts.append(_distillation_name(self.distillation))
        if self.hardness is not None:
            parts.append(f"hardness {_words(self.hardness)}")
        return " + ".join(parts)


Entrant = Unfiltered | LocalGuide | OwnDocuments | Served
"""Settings of one contender."""


def _words(hardness: tuple[HardnessMode, float]) -> str:
    mode, strength = hardness
    return f"{mode.replace('_', ' ')} {strength:g}"


def _distillation_name(distillation: Distillation) -> str:
    """Return the kind of the term, then the settings that differ from the defaults."""
    default = asdict(Distillation())
    different = [f"{key} {value}" for key, value in asdict(distillation).items() if value != default[key]]
    return " ".join(["kl batch", *different])  # in these words, because ledgers have results under them


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to make batches.

    Attributes:
        name: Name in the ledger.
        batching: ``"mined"``: random anchors, each with a mined hard negative. ``"related"``: pairs from the same or
            neighbouring files of one package. ``"random"``: random pairs.
        batch_size: Anchors of a batch.
        steps: Training steps, one batch each.
        seeds: Number of seeds for which batches are made. Each seed has its own ``steps`` batches.
    """

    name: str
    batching: Batching
    batch_size: int
    steps: int
    seeds: int

    @property
    def pool(self) -> int:
        """Number of batches of all seeds."""
        return self.steps * self.seeds


@dataclass(frozen=True, slots=True)
class Stage:
    """Part of the study: some contenders in one regime.

    Attributes:
        name: Name on the command line; several stages may share it.
        regime: Name of the regime.
        table: Heading of the table. Stages with the same heading and regime share a table and its trainings.
        sources: Data sets.
        seeds: Seeds, from 0 to the regime's number of seeds less 1.
        entrants: The contenders, in the order of the table.
        measured: Guides whose filter is measured on the first batches of the regime.
    """

    name: str
    regime: str
    table: str
    sources: tuple[str, ...]
    seeds: tuple[int, ...]
    entrants: tuple[Entrant, ...]
    measured: tuple[Guide, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings of the study.

    Attributes:
        sources: Names of the data sets.
        packages: Packages from which the data sets are read.
        pairs: Maximum number of pairs of each data set.
        guide_share: Share of the modules that train cross-encoder and tuned bi-encoder, between 0 and 1.
        held_out_share: Share of the other modules that is held out for evaluation, between 0 and 1.
        queries: Maximum number of queries in the evaluation of the students.
        guide_queries: Maximum number of queries in the evaluation of the guides.
        measured_batches: Number of batches on which the filter of a guide is measured.
        regimes: Ways to make batches.
        stages: Contenders, in the order in which they are trained.
        layers: Layers of the student.
        tokens: Maximum tokens of a text, for student and bi-encoder.
        learning_rate: Peak learning rate of all trainings.
        temperature: Temperature of all losses.
        mini_batch_size: Texts embedded at a time.
        cross_encoder: Training settings of the cross-encoder.
        tuned: Training settings of the tuned bi-encoder.
    """

    sources: tuple[str, ...]
    packages: tuple[str, ...]
    pairs: int
    guide_share: float
    held_out_share: float
    queries: int
    guide_queries: int
    measured_batches: int
    regimes: tuple[Regime, ...]
    stages: tuple[Stage, ...]
    layers: int
    tokens: int
    learning_rate: float
    temperature: float
    mini_batch_size: int
    cross_encoder: CrossEncoderRecipe
    tuned: TunedRecipe

    @property
    def digest(self) -> str:
        """Digest of all settings that a result depends on, except those that a contender's name says."""
        same = asdict(replace(self, stages=()))
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]

    def on(self, sources: Sequence[str]) -> Plan:
        """Return the plan with trainings and evaluations on some of the data sets; its results are the same."""
        kept = [
            replace(stage, sources=tuple(name for name in stage.sources if name in sources)) for stage in self.stages
        ]
        return replace(self, stages=tuple(stage for stage in kept if stage.sources))

    def regime(self, name: str) -> Regime:
        """Return the regime of a name."""
        return next(one for one in self.regimes if one.name == name)


#: Guides with a server of their own.
SERVED: tuple[Guide, ...] = ("bi-encoder", "tuned bi-encoder", "cross-encoder")

#: Guides whose raw scores the guide ``"mean"`` averages.
AVERAGED: tuple[Guide, ...] = ("tuned bi-encoder", "cross-encoder")

#: Margins whose filter is measured on the pools; some of them are also used in training.
MARGINS: dict[Guide, tuple[Margin, ...]] = {
    guide: (
        *(Margin("absolute", value) for value in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)),
        *(Margin("relative", value) for value in (0.05, 0.1, 0.2, 0.4)),
    )
    for guide in SERVED
}


_IN_BATCH: tuple[HardnessMode, float] = ("in_batch_negatives", 9.0)
_MARGIN = Margin("absolute", 0.05)
_KL = Distillation()

NO_FILTER, HARDNESS, LOCAL = Unfiltered(), Unfiltered(_IN_BATCH), LocalGuide()
_FILTER = Served("bi-encoder", _MARGIN)
_FILTER_KL = Served("bi-encoder", _MARGIN, distillation=_KL)

#: All contenders, with the bi-encoder as guide: its scores cost little, and a setting that does not help with it can be
#: left out with the cross-encoder, which takes longer to score one seed's batches than to train on them.
SCREENED: tuple[Entrant, ...] = (
    NO_FILTER,
    HARDNESS,
    LOCAL,
    OwnDocuments("bi-encoder"),
    _FILTER,
    _FILTER_KL,
    Served("bi-encoder", None, distillation=_KL),
    *(replace(one, hardness=_IN_BATCH) for one in (_FILTER, _FILTER_KL)),
)

#: Contenders that are left, with the reason for each. Change the list after the screening: results stay valid.
FINAL: tuple[Entrant, ...] = (
    NO_FILTER,  # reference of all differences
    HARDNESS,  # strongest rival in the study of 16 steps with mined negatives
    LOCAL,  # the filter that sentence-transformers has already
    _FILTER,  # the loss by default; says what distillation adds
    _FILTER_KL,  # best in the trial on which the loss's distillation rests
    replace(_FILTER_KL, guide="tuned bi-encoder"),  # says what a better guide adds
)

#: In the study of 16 steps hardness gained less than 0.005 in the mean with related texts and with large batches.
_WITHOUT_HARDNESS: tuple[Entrant, ...] = (NO_FILTER, LOCAL, _FILTER_KL)

#: Preselected pairs, compared with all pairs and none. The guide is another model than the preselector.
_NEAREST: tuple[Entrant, ...] = (
    NO_FILTER,
    replace(_FILTER_KL, guide="tuned bi-encoder"),
    *(
        replace(_FILTER_KL, guide="tuned bi-encoder", candidates="nearest", per_anchor=number)
        for number in (4, 8, 16, "auto")
    ),
)

_BOTH = ("docstrings", "code")
_MINED, _RELATED, _LARGE = "hard negatives", "related texts", "large batches"

FULL = Plan(
    sources=_BOTH,
    packages=PACKAGES,
    pairs=12_000,
    guide_share=0.35,
    held_out_share=0.15,
    queries=1_000,
    guide_queries=192,
    measured_batches=20,
    regimes=(
        # The fourth seed is the screening's, so that the final trainings see batches that no setting was chosen on.
        Regime(_MINED, "mined", batch_size=24, steps=60, seeds=4),
        Regime(_RELATED, "related", batch_size=24, steps=60, seeds=3),
        # One seed takes almost all pairs.
        Regime(_LARGE, "random", batch_size=96, steps=60, seeds=1),
    ),
    stages=(
        Stage("screening", _MINED, "screening", _BOTH[:1], (3,), SCREENED),
        Stage("final", _MINED, _MINED, _BOTH, (0, 1, 2), FINAL, measured=("bi-encoder", "tuned bi-encoder")),
        Stage("related", _RELATED, _RELATED, _BOTH, (0, 1, 2), _WITHOUT_HARDNESS, ("bi-encoder",)),
        # One seed, because scoring its batches takes as long as many trainings. The mean uses the same scores.
        Stage(
            "cross-encoder",
            _MINED,
            _MINED,
            _BOTH,
            (0,),
            (
                Served("cross-encoder", _MARGIN),
                Served("cross-encoder", _MARGIN, distillation=_KL),
                Served("mean", _MARGIN, distillation=_KL),
            ),
        ),
        Stage("large", _LARGE, _LARGE, _BOTH[:1], (0,), _WITHOUT_HARDNESS, ("bi-encoder",)),
        Stage("candidates", _MINED, _MINED, _BOTH[:1], (0, 1, 2), _NEAREST),
    ),
    layers=2,
    tokens=48,
    learning_rate=3e-4,
    temperature=0.02,
    mini_batch_size=32,
    cross_encoder=CrossEncoderRecipe(pairs=3_000, hard=1, easy=2, max_length=64, batch_size=32, learning_rate=2e-4),
    tuned=TunedRecipe(pairs=3_000, batch_size=64, learning_rate=1e-4, temperature=0.05),
)


def quick() -> Plan:
    """Make a tiny plan with one data set and one seed, which tests that everything runs; its results mean nothing."""
    sources = ("code",)
    regimes = tuple(replace(regime, batch_size=6, steps=2, seeds=1) for regime in FULL.regimes)
    stages = [replace(stage, sources=sources, seeds=(0,)) for stage in FULL.stages]
    return replace(
        FULL,
        sources=sources,
        packages=(STANDARD_LIBRARY,),
        pairs=400,
        queries=24,
        guide_queries=6,
        measured_batches=2,
        regimes=regimes,
        # The screening has most kinds of contenders; of the other stages two are enough.
        stages=(stages[0], *(replace(stage, entrants=stage.entrants[-2:]) for stage in stages[1:])),
        cross_encoder=replace(FULL.cross_encoder, pairs=16),
        tuned=replace(FULL.tuned, pairs=16),
    )
