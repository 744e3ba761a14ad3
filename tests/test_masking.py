"""Thresholds, masks and statistics of a step, against loops that follow the definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from loss_client.arguments import check_margin
from loss_client.client.errors import ScoreError
from loss_client.filter.grid import GridStep, read_rows
from loss_client.filter.interning import intern
from loss_client.filter.masking import above, related, thresholds
from loss_client.filter.statistics import LossStatistics
from loss_client.filter.step import FilterSettings

from .training import MemoryScorer, MemoryScores, random_scores

# Rows 0 and 3 share an anchor, rows 1 and 4 a positive; the positive of row 2 is a negative of rows 0 and 5.
ANCHORS = ["a0", "a1", "a2", "a0", "a4", "a5"]
POSITIVES = ["p0", "p1", "p2", "p3", "p1", "p5"]
NEGATIVES = ["p2", "n1", "p2", "n3", "p1", "p2"]


def settings(
    strategy: str = "absolute", margin: float = 0.0, anchors: bool = False, positives: bool = False, by: str = "known"
) -> FilterSettings:
    return FilterSettings(strategy, margin, anchors, positives, by)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "margin", "positive", "expected"),
    [
        ("absolute", 0.0, 0.5, 0.5),
        ("absolute", 0.1, -0.5, -0.6),
        ("relative", 0.1, 0.5, 0.45),
        ("relative", 0.1, -0.5, -0.55),
        ("relative", -0.2, 2.0, 2.4),
        ("relative", 0.0, -3.0, -3.0),
    ],
)
def test_thresholds_follow_their_definition(strategy: str, margin: float, positive: float, expected: float) -> None:
    found = thresholds(np.array([positive], np.float32), margin, strategy)  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert found[0] == pytest.approx(expected, abs=1e-6)


def test_a_score_equal_to_the_threshold_is_not_above_it() -> None:
    scores = np.array([[0.3, np.nextafter(np.float32(0.3), np.float32(1)), 0.2]], np.float32)
    assert above(scores, np.array([0.3], np.float32)).tolist() == [[False, True, False]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = value
    with pytest.raises(ScoreError, match=r"1 of 12 scores .* row 1, document 2"):
        above(scores, np.zeros(3, np.float32))


def test_rows_are_related_by_relevance_in_either_direction_or_by_their_anchor() -> None:
    relevant = np.zeros((4, 4), np.bool_)
    relevant[0, 1] = True
    found = related(relevant, np.array([0, 1, 2, 2]))
    expected = {(0, 1), (1, 0), (2, 3), (3, 2)} | {(row, row) for row in range(4)}
    assert set(zip(*np.nonzero(found), strict=True)) == expected


@pytest.mark.parametrize(
    ("margin", "strategy", "score_type", "message"),
    [
        (1.0, "absolute", "probability", "masks every negative"),
        (1.5, "relative", "probability", "masks every negative"),
        (-1.0, "absolute", "probability", "masks no negative"),
        (math.nan, "absolute", "raw", "finite"),
    ],
)
def test_margins_that_cannot_work_are_refused(margin: float, strategy: str, score_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_margin(margin, strategy, score_type)  # type: ignore[arg-type]


def test_margins_of_logits_are_not_bounded() -> None:
    check_margin(4.0, "absolute", "raw")
    check_margin(1.0, "relative", "raw")
    check_margin(-1.0, "relative", "probability")


def test_interning_keeps_the_order_of_first_appearance() -> None:
    found = intern([["b", "a", "b"], ["c", "a", ""]])
    assert found.texts == ["b", "a", "c", ""]
    assert [ids.tolist() for ids in found.ids] == [[0, 1, 0], [2, 1, 3]]


def test_rows_are_read_in_runs_and_nothing_else_is_waited_for() -> None:
    values = np.arange(30, dtype=np.float32).reshape(10, 3)
    matrix = MemoryScores([str(row) for row in range(10)], ["x", "y", "z"], {}, values)
    wanted = np.array([7, 1, 8, 1, 6])
    assert np.array_equal(read_rows(matrix, wanted), values[wanted])
    assert matrix.reads == [(1, 2), (6, 9)]


def expected_mask(options: FilterSettings, seed: int, row: int) -> list[bool]:
    """Return one row of the mask by its definition, pair by pair."""
    score = random_scores(seed)
    score(list(dict.fromkeys(ANCHORS)), asked_documents(options))
    score(list(dict.fromkeys(POSITIVES)), list(dict.fromkeys(POSITIVES)))
    batch = range(len(ANCHORS))

    def pair(query: str, document: str) -> np.float32:
        return np.float32(score([query], [document])[0, 0])

    def limit(anchor: int) -> np.float32:
        own = pair(ANCHORS[anchor], POSITIVES[anchor])
        width = abs(own) * np.float32(options.margin) if options.margin_strategy == "relative" else options.margin
        return np.float32(own - np.float32(width))

    def relevant(anchor: int, document: str) -> bool:
        labelled = {POSITIVES[other] for other in batch if ANCHORS[other] == ANCHORS[anchor]}
        return bool(document in labelled or pair(ANCHORS[anchor], document) > limit(anchor))

    def known(i: int, j: int) -> bool:
        return ANCHORS[i] == ANCHORS[j] or relevant(i, POSITIVES[j]) or relevant(j, POSITIVES[i])

    mask = [other != row and relevant(row, POSITIVES[other]) for other in batch]
    for wanted, column in ((options.contrast_anchors, ANCHORS), (options.contrast_positives, POSITIVES)):
        if wanted and options.contrast_filter == "known":
            mask += [known(row, other) for other in batch]
        elif wanted:
            mask += [
                column[row] == column[other] or bool(pair(column[row], column[other]) > limit(row)) for other in batch
            ]
    return mask + [relevant(row, document) for document in NEGATIVES]


def asked_documents(options: FilterSettings) -> list[str]:
    documents = [*POSITIVES, *NEGATIVES]
    if options.contrast_filter == "scores" and options.contrast_anchors:
        documents += ANCHORS
    return list(dict.fromkeys(documents))


@pytest.mark.parametrize(
    ("strategy", "margin", "anchors", "positives", "by"),
    [
        (strategy, margin, anchors, positives, by)
        for strategy, margin in [("absolute", 0.0), ("absolute", 0.4), ("relative", 0.3), ("absolute", -0.4)]
        for anchors, positives in itertools.product([False, True], repeat=2)
        for by in ["known", "scores"]
    ],
)
def test_masks_follow_the_definition_with_repeated_texts(
    strategy: str, margin: float, anchors: bool, positives: bool, by: str
) -> None:
    options = settings(strategy, margin, anchors, positives, by)
    for seed in range(5):
        scorer = MemoryScorer(random_scores(seed))
        columns = [ANCHORS, POSITIVES, NEGATIVES]
        step = settled(columns, options, lambda q, d, s=scorer: s.stream_grid(q, d))
        found = np.concatenate([step.mask(0, 4), step.mask(4, 6)])
        assert found.tolist() == [expected_mask(options, seed, row) for row in range(6)]


def settled(columns: list[list[str]], options: FilterSettings, ask: Any) -> GridStep:
    scored = options.contrast_filter == "scores"
    step = GridStep(columns, (scored and options.contrast_anchors, scored and options.contrast_positives), ask)
    step.settle(options)
    return step


def begin(options: FilterSettings, scorer: MemoryScorer) -> GridStep:
    return settled([ANCHORS, POSITIVES, NEGATIVES], options, scorer.stream_grid)


def test_each_distinct_pair_is_asked_for_once() -> None:
    scorer = MemoryScorer(random_scores())
    step = begin(settings(), scorer)
    assert [(job.queries, job.documents) for job in scorer.jobs] == [
        (["a0", "a1", "a2", "a4", "a5"], ["p0", "p1", "p2", "p3", "p5", "n1", "n3"])
    ]
    assert step.statistics().pairs == 35


def test_what_is_known_costs_no_scores_but_scores_of_contrast_pairs_do() -> None:
    scorer = MemoryScorer(random_scores())
    begin(settings(anchors=True, positives=True), scorer)
    assert [job.shape for job in scorer.jobs] == [(5, 7)]
    scorer = MemoryScorer(random_scores())
    begin(settings(anchors=True, positives=True, by="scores"), scorer)
    assert [job.shape for job in scorer.jobs] == [(5, 12), (5, 5)]


def test_a_copy_of_the_positive_is_masked_whatever_the_scores() -> None:
    scorer = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    options = settings(margin=-0.9)
    step = settled([["a", "b"], ["p", "p"], ["q", "p"]], options, scorer.stream_grid)
    assert scorer.jobs[0].shape == (2, 2)
    assert step.mask(0, 2).tolist() == [[False, True, False, True], [True, False, False, True]]


def test_without_contrast_terms_a_row_needs_no_later_row() -> None:
    scorer = MemoryScorer(random_scores())
    step = begin(settings(), scorer)
    step.mask(0, 2)
    assert scorer.jobs[0].reads == [(0, 2)]
    step.mask(2, 4)  # rows 2 and 3 are anchors 2 and 0
    assert scorer.jobs[0].reads == [(0, 2), (0, 1), (2, 3)]


def test_statistics_count_each_row_once() -> None:
    scorer = MemoryScorer(random_scores())
    step = begin(settings(margin=0.2, anchors=True), scorer)
    masks = np.concatenate([step.mask(0, 4), step.mask(4, 6), step.mask(0, 4)])[:6]
    documents = np.concatenate([masks[:, :6], masks[:, 12:]], axis=1)
    found = step.statistics()
    assert (found.steps, found.negatives, found.pairs) == (1, 6 * 11, 35)
    assert found.masked_negatives == np.count_nonzero(documents)

    total = LossStatistics()
    total.add(found)
    total.add(found)
    assert total.masked_negatives == 2 * found.masked_negatives
    total.reset()
    assert total == LossStatistics()


def test_a_job_begun_before_another_could_not_be_is_cancelled() -> None:
    scorer = MemoryScorer(random_scores())

    def ask(queries: list[str], documents: list[str]) -> MemoryScores:
        if scorer.jobs:
            raise ConnectionError("no second job")
        return scorer.stream_grid(queries, documents)

    with pytest.raises(ConnectionError, match="no second job"):
        settled([ANCHORS, POSITIVES], settings(positives=True, by="scores"), ask)
    assert [job.cancelled for job in scorer.jobs] == [True]
