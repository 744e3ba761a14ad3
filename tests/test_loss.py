"""RerankerCachedGISTEmbedLoss: value and gradients equal those of independent references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)
from torch import Tensor, nn

from .losses import make
from .training import (
    MemoryScorer,
    assert_same_gradients,
    cosines_of,
    features,
    gradients,
    guide,
    loss_and_gradients,
    random_scores,
    texts,
)

MARGINS = [("absolute", 0.0), ("absolute", 0.3), ("absolute", -0.2), ("relative", 0.3), ("relative", -0.1)]


@pytest.fixture(scope="module")
def judge(directory: Path) -> SentenceTransformer:
    return guide(directory)


def masks(
    columns: list[list[str]], contrast: tuple[bool, bool] = (False, False), by: str = "known", score: Any = None
) -> np.ndarray:
    """Return the mask of a batch with margin 0 by its definition, pair by pair, in the order of the loss's logits."""
    score = score or random_scores()
    anchors, positives, *negatives = columns
    every = list(dict.fromkeys(text for column in columns for text in column))
    table = score(every, every)
    rows = range(len(anchors))

    def above(row: int, query: str, document: str) -> bool:
        own = table[every.index(anchors[row]), every.index(positives[row])]
        return bool(table[every.index(query), every.index(document)] > own)

    def relevant(row: int, document: str) -> bool:
        labelled = {positives[other] for other in rows if anchors[other] == anchors[row]}
        return document in labelled or above(row, anchors[row], document)

    def known(row: int, other: int) -> bool:
        return anchors[row] == anchors[other] or relevant(row, positives[other]) or relevant(other, positives[row])

    found = []
    for row in rows:
        mask = [other != row and relevant(row, positives[other]) for other in rows]
        for wanted, side in zip(contrast, (anchors, positives), strict=True):
            for other in rows if wanted else ():
                same = side[row] == side[other]
                mask.append(known(row, other) if by == "known" else same or above(row, side[row], side[other]))
        mask += [relevant(row, text) for column in negatives for text in column]
        found.append(mask)
    return np.array(found)


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("mini_batch_size", [3, 32])
@pytest.mark.parametrize(("strategy", "margin"), MARGINS)
def test_equals_the_local_loss_when_its_guide_is_served(
    model: SentenceTransformer,
    judge: SentenceTransformer,
    columns: int,
    mini_batch_size: int,
    strategy: Any,
    margin: float,
) -> None:
    batch = texts(columns, 8)
    options: dict[str, Any] = {"mini_batch_size": mini_batch_size, "margin_strategy": strategy, "margin": margin}
    reference = CachedGISTEmbedLoss(
        model, judge, temperature=0.05, contrast_anchors=False, contrast_positives=False, **options
    )
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    scorer = MemoryScorer(cosines_of(judge))
    loss = make(model, scorer, **options)
    found = loss_and_gradients(loss, features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    # The comparison shows little unless the filter masks negatives, with positives' scores of both signs.
    assert 0 < loss.statistics.masked_negatives < loss.statistics.negatives
    positives = scorer.jobs[0].values.diagonal()
    assert positives.min() < 0 < positives.max()


@pytest.mark.parametrize("columns", [2, 4])
def test_equals_the_local_loss_with_both_contrast_terms_scored(
    model: SentenceTransformer, judge: SentenceTransformer, columns: int
) -> None:
    batch = texts(columns, 8)
    reference = CachedGISTEmbedLoss(model, judge, temperature=0.05, mini_batch_size=3, margin=0.1)
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    options: dict[str, Any] = {"contrast_anchors": True, "contrast_positives": True, "contrast_filter": "scores"}
    loss = make(model, MemoryScorer(cosines_of(judge)), mini_batch_size=3, margin=0.1, **options)
    found = loss_and_gradients(loss, features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


def test_equals_the_unfiltered_loss_where_nothing_is_above_the_threshold(model: SentenceTransformer) -> None:
    batch = texts(3, 6)
    expected = loss_and_gradients(
        CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4), features(model, batch, raw=False)
    )
    scorer = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    found = loss_and_gradients(make(model, scorer, mini_batch_size=4), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


def loops(
    model: SentenceTransformer, columns: list[list[str]], mask: np.ndarray, contrast: tuple[bool, bool]
) -> Tensor:
    """Compute the loss pair by pair, with ordinary autograd; ``mask`` is in the order of the loss's logits."""
    embedded = [model(model.preprocess(column))["sentence_embedding"] for column in columns]
    anchors, positives, *negatives = embedded
    losses = []
    for row, anchor in enumerate(anchors):
        candidates = [(anchor, other) for other in positives]
        candidates += [(anchor, other) for other in anchors] if contrast[0] else []
        candidates += [(positives[row], other) for other in positives] if contrast[1] else []
        candidates += [(anchor, other) for column in negatives for other in column]
        logits = [nn.functional.cosine_similarity(left, right, dim=0) / 0.05 for left, right in candidates]
        kept = [logit for logit, masked in zip(logits, mask[row], strict=True) if not masked]
        losses.append(torch.logsumexp(torch.stack(kept), 0) - logits[row])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("contrast", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("by", ["known", "scores"])
def test_equals_the_sum_over_pairs_with_repeated_texts(
    model: SentenceTransformer, contrast: tuple[bool, bool], by: Any
) -> None:
    anchors, positives, negatives = texts(3, 6)
    columns = [[*anchors[:5], anchors[0]], [*positives[:4], positives[1], positives[5]], [positives[2], *negatives[1:]]]
    scorer = MemoryScorer(random_scores())
    loss = make(
        model,
        scorer,
        mini_batch_size=4,
        contrast_anchors=contrast[0],
        contrast_positives=contrast[1],
        contrast_filter=by,
    )
    found = loss_and_gradients(loss, features(model, columns))
    mask = masks(columns, contrast, by)
    loss.zero_grad()
    expected = loops(model, columns, mask, contrast)
    expected.backward()
    assert found[0] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(found[1], gradients(model))


def test_four_copies_of_one_pair_are_no_negatives_of_each_other(model: SentenceTransformer) -> None:
    batch = [[column[0]] * 4 for column in texts(2, 1)]
    scorer = MemoryScorer(random_scores())
    contrast = {"contrast_anchors": True, "contrast_positives": True}
    assert loss_and_gradients(make(model, scorer, **contrast), features(model, batch))[0] == 0
    assert scorer.jobs[0].shape == (1, 1)


@pytest.mark.parametrize("columns", [2, 3])
def test_a_batch_of_one(model: SentenceTransformer, judge: SentenceTransformer, columns: int) -> None:
    batch = texts(columns, 1)
    reference = CachedGISTEmbedLoss(model, judge, temperature=0.05, contrast_anchors=False, contrast_positives=False)
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    found = loss_and_gradients(make(model, MemoryScorer(cosines_of(judge))), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert_same_gradients(found[1], expected[1])


def test_mini_batches_by_tokens_change_nothing(model: SentenceTransformer) -> None:
    batch = texts(3, 8)
    scorer = MemoryScorer(random_scores())
    expected = loss_and_gradients(make(model, scorer), features(model, batch))
    found = loss_and_gradients(make(model, scorer, mini_batch_num_tokens=50), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


def test_dropout_is_replayed(model: SentenceTransformer) -> None:
    model.train()
    batch = texts(2, 6)
    loss = make(model, MemoryScorer(random_scores()))
    torch.manual_seed(3)
    found = loss_and_gradients(loss, features(model, batch))
    mask = masks(batch)
    loss.zero_grad()
    torch.manual_seed(3)
    expected = loops(model, batch, mask, (False, False))
    expected.backward()
    assert found[0] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(found[1], gradients(model))
    torch.manual_seed(4)
    assert loss_and_gradients(loss, features(model, batch))[0] != pytest.approx(found[0], abs=1e-3)


def test_two_forwards_before_one_backward(model: SentenceTransformer) -> None:
    first, second = features(model, texts(2, 4)), features(model, [column[::-1] for column in texts(2, 8)])
    loss = make(model, MemoryScorer(random_scores()), mini_batch_size=3)
    one, two = loss_and_gradients(loss, first)[1], loss_and_gradients(loss, second)[1]
    loss.zero_grad()
    values = [loss(first, None), loss(second, None)]
    (values[0] + 0.5 * values[1]).backward()
    assert_same_gradients(gradients(model), {name: one[name] + 0.5 * two[name] for name in one})


def test_gradients_carry_the_scale_of_the_outer_backward(model: SentenceTransformer) -> None:
    batch = features(model, texts(2, 4))
    loss = make(model, MemoryScorer(random_scores()))
    plain = loss_and_gradients(loss, batch)[1]
    loss.zero_grad()
    (loss(batch, None) * 128).backward()
    assert_same_gradients(gradients(model), {name: 128 * value for name, value in plain.items()})


def test_evaluation_gives_the_same_value_and_no_gradient(model: SentenceTransformer) -> None:
    batch = features(model, texts(3, 6))
    loss = make(model, MemoryScorer(random_scores()), mini_batch_size=4)
    expected = float(loss(batch, None).detach())
    with torch.no_grad():
        found = loss(batch, None)
    assert not found.requires_grad
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_matryoshka_equals_matryoshka_over_the_local_loss(
    model: SentenceTransformer, judge: SentenceTransformer
) -> None:
    batch, dims, weights = texts(3, 6), [32, 16, 8], [1.0, 0.5, 0.25]
    reference = CachedGISTEmbedLoss(
        model, judge, temperature=0.05, mini_batch_size=4, contrast_anchors=False, contrast_positives=False
    )
    expected = loss_and_gradients(MatryoshkaLoss(model, reference, dims, weights), features(model, batch, raw=False))
    scorer = MemoryScorer(cosines_of(judge))
    inner = make(model, scorer, mini_batch_size=4)
    found = loss_and_gradients(MatryoshkaLoss(model, inner, dims, weights), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert len(scorer.jobs) == 1
    assert inner.statistics.negatives == 6 * 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_cosines_keep_their_digits(model: SentenceTransformer, dtype: torch.dtype) -> None:
    batch, scorer = texts(3, 6), MemoryScorer(random_scores())
    # One mini-batch, because results of other sizes are rounded differently.
    loss = make(model, scorer, mini_batch_size=6, temperature=0.01)
    with torch.autocast("cpu", dtype=dtype):
        embedded = [model(model.preprocess(column))["sentence_embedding"].detach() for column in batch]
        found, grads = loss_and_gradients(loss, features(model, batch))
    mask = torch.from_numpy(masks(batch))
    documents = torch.cat(embedded[1:]).double()
    logits = nn.functional.cosine_similarity(embedded[0].double()[:, None], documents[None], dim=-1) / 0.01
    expected = nn.functional.cross_entropy(logits.masked_fill(mask, -torch.inf), torch.arange(6))
    assert found == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-3)
    assert all(value.isfinite().all() for value in grads.values())
