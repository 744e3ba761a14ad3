"""Masking: pure functions from scores to thresholds and masks of false negatives.

A negative is dropped if its score is above the score of the anchor's own positive, less a margin. This is the filter of
GISTEmbed (https://huggingface.co/papers/2402.16829), with the two margin strategies of sentence-transformers'
``CachedGISTEmbedLoss``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loss_client.client.errors import ScoreError

MarginStrategy = Literal["absolute", "relative"]
"""Formula of the threshold; see :func:`thresholds`."""


def thresholds(positive_scores: NDArray[np.float32], margin: float, strategy: MarginStrategy) -> NDArray[np.float32]:
    """Return for each anchor the score above which a negative is dropped.

    ``"absolute"``: ``s - margin``. ``"relative"``: ``s - |s| * margin``; the absolute value
    keeps the threshold below a positive's score that is negative. Computed in float32, as sentence-transformers does.

    Args:
        positive_scores: The score of each anchor with its own positive, shape ``(rows,)``.
        margin: The margin.
        strategy: ``"absolute"`` or ``"relative"``.

    Returns:
        The thresholds, shape ``(rows,)``.
    """
    width = np.float32(margin) * np.abs(positive_scores) if strategy == "relative" else np.float32(margin)
    return np.subtract(positive_scores, width, dtype=np.float32)


def above(scores: NDArray[np.float32], limits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where a score is above its row's threshold; a score equal to the threshold is not.

    Args:
        scores: Shape ``(rows, documents)``.
        limits: Shape ``(rows,)``.

    Returns:
        Shape ``(rows, documents)``.

    Raises:
        ScoreError: A score is NaN or infinite.
    """
    check_finite(scores)
    return scores > limits[:, None]


def check_finite(scores: NDArray[np.float32]) -> None:
    """Raise ``ScoreError`` if one of the scores, shape ``(rows, documents)``, is NaN or infinite."""
    # Comparisons with NaN are false: a NaN score would keep its negative without an error.
    finite = np.isfinite(scores)
    if not finite.all():
        row, document = np.argwhere(~finite)[0]
        raise ScoreError(
            f"{np.size(finite) - np.count_nonzero(finite)} of {scores.size} scores are not finite, the first one "
            f"{scores[row, document]} at row {row}, document {document}. The filter needs finite scores: check the "
            "model that the reranker serves and its number format."
        )


def same_id(rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return where the text of a row equals the text of a column, from ids that are equal if and only if the texts are.

    Args:
        rows: Shape ``(rows,)``.
        columns: Shape ``(columns,)``.

    Returns:
        Shape ``(rows, columns)``.
    """
    return np.equal(rows[:, None], columns[None, :], dtype=np.bool_)


def related(relevant: NDArray[np.bool_], anchor_ids: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return which rows of a batch are related, that is, known to be about the same thing.

    Rows i and j are related if the positive of i is relevant to anchor j, or that of j to anchor i, or if both have
    the same anchor text, or if i is j.

    Args:
        relevant: Whether positive j is relevant to anchor i, shape ``(batch, batch)``.
        anchor_ids: Ids that are equal if and only if the anchors' texts are, shape ``(batch,)``.

    Returns:
        A symmetric matrix with a true diagonal, shape ``(batch, batch)``.
    """
    return relevant | relevant.T | same_id(anchor_ids, anchor_ids)
