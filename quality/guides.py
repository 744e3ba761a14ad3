"""Measures of a guide without training: ranking quality, and known false negatives that its filter masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score, roc_auc_score  # type: ignore[import-untyped]
from torch import Tensor

from loss_client.filter.masking import above, thresholds
from quality.batches import Batch
from quality.plan import Margin
from quality.sources import KnownRelevance, normalize

ScoreGrid = Callable[[Sequence[str], Sequence[str]], NDArray[np.float32]]
"""Function that scores every query with every document, shape ``(queries, documents)``."""


class RememberingGuide(SentenceTransformer):
    """Embedding model that caches its embeddings, for a guide that many trainings share.

    Args:
        model: Model to use; its weights are shared and must not change.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__(modules=list(model), device="cpu")
        self._embeddings: dict[bytes, Tensor] = {}

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``"sentence_embedding"`` to the features, shape ``(batch, dim)``; without gradients."""
        mask = input["attention_mask"].bool()
        keys = [ids[kept].numpy().tobytes() for ids, kept in zip(input["input_ids"], mask, strict=True)]
        missing = {key: row for row, key in enumerate(keys) if key not in self._embeddings}
        if missing:
            rows = torch.tensor(list(missing.values()))
            part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in input.items()}
            with torch.inference_mode():
                embedded = super().forward(part, **kwargs)["sentence_embedding"]
            self._embeddings.update(zip(missing, embedded.clone(), strict=True))
        input["sentence_embedding"] = torch.stack([self._embeddings[key] for key in keys])
        return input


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Batch with a guide's scores of all its pairs. All attributes have the shape ``(anchors, documents)``.

    Attributes:
        scores: Scores; each anchor's positive is on the diagonal.
        known: True where the document is known to answer the anchor.
        copies: True where the document has the same words as the anchor's positive; true on the diagonal.
        equal: True where the document has the same text as the anchor's positive; true on the diagonal.
    """

    scores: NDArray[np.float32]
    known: NDArray[np.bool_]
    copies: NDArray[np.bool_]
    equal: NDArray[np.bool_]

    @property
    def negatives(self) -> NDArray[np.bool_]:
        """True except on the diagonal of the anchors' positives."""
        return ~np.eye(*self.scores.shape, dtype=np.bool_)


def score(batch: Batch, score_grid: ScoreGrid, known: KnownRelevance) -> ScoredBatch:
    """Score all pairs of a batch; documents are in the loss's order of columns: positives, then negatives."""
    anchors, *columns = zip(*batch, strict=True)
    documents = [text for column in columns for text in column]
    own = documents[: len(anchors)]

    def compare(same: Callable[[int, int], bool]) -> NDArray[np.bool_]:
        return np.array([[same(row, place) for place in range(len(documents))] for row in range(len(anchors))])

    words = [normalize(document) for document in documents]
    return ScoredBatch(
        scores=score_grid(anchors, documents),
        known=compare(lambda row, place: known.answers(anchors[row], documents[place])),
        copies=compare(lambda row, place: words[row] == words[place]),
        equal=compare(lambda row, place: own[row] == documents[place]),
    )


def count_masked(batches: Sequence[ScoredBatch], margin: Margin) -> dict[str, int]:
    """Count the negatives in batches, and those that the loss's filter masks with ``margin``.

    As in the loss, negatives with the same text as the positive are masked whatever their score.

    Returns:
        Numbers of negatives: ``known_copies`` (copies of the positive) and ``known_others`` (documents of the same
        query elsewhere in the data set) are known false negatives, ``unknown`` the rest; ``masked_known_copies``,
        ``masked_known_others`` and ``masked_unknown`` are the numbers of masked ones among them.
    """
    counts = dict.fromkeys(
        [f"{masked}{kind}" for masked in ("", "masked_") for kind in ("known_copies", "known_others", "unknown")], 0
    )
    for batch in batches:
        limits = thresholds(batch.scores.diagonal(), margin.value, margin.strategy)
        masked = above(batch.scores, limits) | batch.equal
        copies = batch.negatives & batch.copies
        others = batch.negatives & batch.known & ~batch.copies
        unknown = batch.negatives & ~batch.known & ~batch.copies
        for kind, which in (("known_copies", copies), ("known_others", others), ("unknown", unknown)):
            counts[kind] += int(which.sum())
            counts[f"masked_{kind}"] += int((which & masked).sum())
    return counts


def evaluate(batches: Sequence[ScoredBatch]) -> dict[str, float]:
    """Evaluate a guide's scores on batches of held-out pairs.

    Returns:
        ``ndcg``: mean nDCG@10 of the anchors' rankings of the documents in their batch, with all documents relevant
        that are known to answer the anchor. ``first``: share of the anchors for which the first document is relevant
        (accuracy@1). ``known_auc``: probability that a known false negative's score minus the score of the anchor's
        positive is higher than that of another negative (AUC; 0.5 is chance, NaN without known false negatives).
        ``known``: number of known false negatives. ``queries``: number of anchors.
    """
    relevant = np.concatenate([batch.known | batch.copies for batch in batches])
    scores = np.concatenate([batch.scores for batch in batches])
    negatives = np.concatenate([batch.negatives for batch in batches])
    beyond = np.concatenate([batch.scores - batch.scores.diagonal()[:, None] for batch in batches])[negatives]
    labels = relevant[negatives]
    best = scores.argmax(axis=1)
    return {
        "ndcg": float(ndcg_score(relevant.astype(float), scores, k=10)),
        "first": float(relevant[np.arange(len(best)), best].mean()),
        "known_auc": float(roc_auc_score(labels, beyond)) if 0 < labels.sum() < labels.size else float("nan"),
        "known": int(labels.sum()),
        "queries": len(scores),
    }
