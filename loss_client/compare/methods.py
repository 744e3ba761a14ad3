"""Methods of the comparison, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from loss_client.plan.arithmetic import Candidates

Method = Literal[
    "no filter", "hardness", "filter", "filter + distillation", "filter, nearest", "filter + distillation, nearest"
]
"""Loss of a training: the first two do without a reranker, the last two score the nearest pairs only."""

PLAIN: Method = "no filter"
HARDNESS: Method = "hardness"
FILTER: Method = "filter"
DISTILLATION: Method = "filter + distillation"
WITHOUT_RERANKER: tuple[Method, ...] = (PLAIN, HARDNESS)
WITH_ALL_PAIRS: Mapping[Method, Method] = {
    "filter, nearest": FILTER,
    "filter + distillation, nearest": DISTILLATION,
}
"""Methods that score the nearest pairs only, each with the method that is the same with all pairs."""

HARDNESS_STRENGTH = 9.0
"""Strength of ``hardness``, with the mode ``in_batch_negatives``: the strength of the study in docs/quality.md."""


def methods_of(candidates: Collection[Candidates]) -> tuple[Method, ...]:
    """Return the methods of a comparison, in its order, for the modes of the loss that it compares."""
    return (
        *WITHOUT_RERANKER,
        *(WITH_ALL_PAIRS.values() if "all" in candidates else ()),
        *(WITH_ALL_PAIRS if "nearest" in candidates else ()),
    )
