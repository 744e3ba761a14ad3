"""Parts of the soft targets by themselves: places of documents, equal anchors, the entropies' grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loss_client.filter.calibration import entropy_sums, temperature_of
from loss_client.filter.candidates import CandidateStep
from loss_client.filter.equal_anchors import EqualAnchors
from loss_client.filter.grid import GridStep
from loss_client.filter.step import FilterSettings
from loss_client.filter.targets import Places

from .training import MemoryScorer


def test_a_text_is_represented_by_the_rows_own_occurrence_or_else_by_the_first() -> None:
    # Texts by id; id 4 is an anchor's, no document's. One contrast block lies between the columns.
    positives, negatives = np.array([0, 1, 2]), np.array([3, 0, 3])
    places = Places([positives, negatives], 5, 1)
    assert places.columns(np.array([0, 1, 2])).tolist() == [
        [0, 1, 2, 6, -1],
        [7, 1, 2, 6, -1],
        [0, 1, 2, 8, -1],
    ]
    scores = np.arange(10, dtype=np.float32).reshape(2, 5)
    targets = places.targets(np.array([1, 2]), scores)
    assert targets.columns.tolist() == [[7, 1, 2, 6], [0, 1, 2, 8]]
    assert targets.scores.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_rows_with_equal_anchors_share_their_positives() -> None:
    same = EqualAnchors(np.array([5, 6, 5, 7, 6, 5]), np.array([0, 1, 2, 3, 1, 0]))
    flags = np.zeros((3, 4), np.bool_)
    same.mark(flags, np.array([5, 3, 1]))
    assert flags.tolist() == [[True, False, True, False], [False] * 4, [False, True, False, False]]
    held = np.zeros((2, 6), dtype=np.bool_)
    held[same.holders(np.array([2, 3]))] = True
    assert held.tolist() == [[True, False, True, False, False, True], [False] * 6]
    assert [found.tolist() for found in same.positives(np.array([1, 5]))] == [[0, 1, 1], [1, 0, 2]]


@pytest.mark.parametrize("kind", ["all", "nearest"])
def test_a_positive_that_an_equal_anchor_shares_relates_rows(kind: str) -> None:
    columns = [["a", "a", "b"], ["p0", "p1", "p1"]]

    def low(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        own = {("a", "p0"): 0.9, ("a", "p1"): 0.8, ("b", "p1"): 0.7}
        return np.array([[own.get((query, text), 0.0) for text in documents] for query in queries], np.float32)

    scorer = MemoryScorer(low)
    step: Any = GridStep(columns, (False, False), scorer.stream_grid)
    if kind == "nearest":
        step = CandidateStep(columns, 1 - 1e-12, None, scorer.stream_pairs)
    # A margin by which no score of a negative is above the positive's.
    step.settle(FilterSettings("absolute", -0.5, True, False, "known"))
    step.select(3, lambda begin, end: torch.zeros(end - begin, 6))
    # Columns: positives, anchors. Row 2's positive is also the one of row 1, whose anchor is that of row 0.
    assert step.mask(0, 3).tolist() == [
        [False, True, True, True, True, True],
        [True, False, True, True, True, True],
        [False, True, False, True, True, True],
    ]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_temperature_is_in_units_of_the_scores(scale: float) -> None:
    scores = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    scores[3, 5:] = np.nan
    scores[4, 1:] = np.nan  # one score: no distribution
    sums = entropy_sums(scores * np.float32(scale))
    assert sums[0] == 19
    plain = temperature_of(entropy_sums(scores), 0.3)
    assert temperature_of(sums, 0.3) == pytest.approx(scale * (plain or 0), rel=0.01)
    assert temperature_of(np.zeros_like(sums), 0.3) is None
