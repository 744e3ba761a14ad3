"""LossStatistics: counts of the filter's work."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class LossStatistics:
    """What the filter did, summed over the loss's forward passes (evaluation included) since the last ``reset``.

    Attributes:
        steps: Forward passes.
        unfiltered_steps: Of these, those whose scores could not be had, with ``on_error="unfiltered"``.
        anchors: Anchors.
        scored_anchors: Of these, those whose scores came.
        outscored_positives: Of these, those with a document of another text that scored above their own positive.
        negatives: Documents that stood as negatives of an anchor before the filter: for each anchor all documents of
            the batch but its own positive. Pairs of two anchors or two positives are not counted.
        masked_negatives: Of these, how many the filter dropped.
        scored_negatives: Of these, how many had a score.
        pairs: Pairs of distinct texts whose score was asked for.
        cached_pairs: Of these, how many the server had in its cache.
        remembered_pairs: Of these, how many the client had from before.
        skipped_pairs: Pairs of distinct texts that were left out, with ``candidates="mass"``.
        rounds: How often scores were asked for.
        reconnects: Streams that were lost and begun again.
        seconds_waited: Seconds that the loss waited for scores.
        positive_scores: Sum of the scores of the scored anchors' positives.
        negative_scores: Sum of the scores of the negatives that had one.
        unscored_share: Sum over the scored anchors of the share of the softmax denominator, after masking, that had no
            score.
        capped_anchors: Anchors whose share is above ``epsilon``, because of ``max_candidates``.
    """

    steps: int = 0
    unfiltered_steps: int = 0
    anchors: int = 0
    scored_anchors: int = 0
    outscored_positives: int = 0
    negatives: int = 0
    masked_negatives: int = 0
    scored_negatives: int = 0
    pairs: int = 0
    cached_pairs: int = 0
    remembered_pairs: int = 0
    skipped_pairs: int = 0
    rounds: int = 0
    reconnects: int = 0
    seconds_waited: float = 0.0
    positive_scores: float = 0.0
    negative_scores: float = 0.0
    unscored_share: float = 0.0
    capped_anchors: int = 0

    def add(self, other: LossStatistics) -> None:
        """Add the counts of ``other`` to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def since(self, earlier: LossStatistics) -> LossStatistics:
        """What came on top of ``earlier``."""
        return LossStatistics(
            **{field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)}
        )

    def reset(self) -> None:
        """Set every count to zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)
