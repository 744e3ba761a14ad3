"""Methods of the comparison, by name."""

from __future__ import annotations

from typing import Literal

Method = Literal["no filter", "hardness", "filter", "filter + distillation"]
"""Loss of a training: the first two do without a reranker."""

PLAIN: Method = "no filter"
HARDNESS: Method = "hardness"
FILTER: Method = "filter"
DISTILLATION: Method = "filter + distillation"
METHODS: tuple[Method, ...] = (PLAIN, HARDNESS, FILTER, DISTILLATION)
WITHOUT_RERANKER: tuple[Method, ...] = (PLAIN, HARDNESS)

HARDNESS_STRENGTH = 9.0
"""Strength of ``hardness``, with the mode ``in_batch_negatives``: the strength of the study in docs/quality.md."""
