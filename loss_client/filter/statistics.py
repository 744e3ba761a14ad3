"""LossStatistics: counts of the anchors, negatives, pairs and scores that the filter handled."""

from __future__ import annotations

from dataclasses import dataclass, fields

from loss_client.former_names import former_attribute


@dataclass(slots=True)
class LossStatistics:
    """Counts of the filter, summed over the loss's forward passes (evaluation included) since the last ``reset``.

    Attributes:
        steps: Forward passes.
        unfiltered_steps: Of these, passes whose scores did not arrive, with ``on_error="unfiltered"``.
        anchors: Anchors.
        scored_anchors: Of these, anchors whose scores arrived.
        outscored_positives: Of these, anchors for which a document with another text than the positive's scored above
            the positive.
        negatives: Negatives of all anchors before the filter: for each anchor all documents of the batch but its own
            positive. Pairs of two anchors or two positives are not counted.
        masked_negatives: Of these, negatives that the filter dropped.
        scored_negatives: Of ``negatives``, those with a score.
        pairs: Pairs of distinct texts whose score was asked for.
        cached_pairs: Of these, pairs whose score the server had in its cache.
        client_cached_pairs: Of these, pairs whose score the client had in its own cache.
        skipped_pairs: Pairs of distinct texts without a score, with ``candidates`` other than ``"all"``.
        preselected_pairs: Pairs that the preselector chose.
        late_choices: Steps that did without preselected pairs, because these had not been chosen in time.
        late_pairs: Pairs that were asked for and whose scores did not arrive in time, because of ``max_wait`` or
            ``per_anchor="auto"``.
        probed_pairs: Random pairs that were scored to estimate ``missed_masks``, beside ``pairs``.
        missed_masks: Estimated number of pairs without a score that the filter would have dropped, with a
            preselector.
        rounds: Scoring jobs.
        reconnects: Streams that broke and were replaced by another.
        servers: Sum over the steps of the servers that scored a step's pairs, of the job with most of them.
        wait_seconds: Seconds that the loss waited for scores.
        positive_scores: Sum of the scores of the scored anchors' positives.
        negative_scores: Sum of the scores of the scored negatives.
        unscored_fraction: Sum over the scored anchors of the fraction of the softmax denominator, after masking, that
            candidates without a score hold.
        capped_anchors: Anchors with such a fraction above ``1 - top_p``, because of ``max_candidates`` or ``max_wait``.
        distilled_anchors: Anchors in the distillation term: those with scores.
        distillation_loss: Sum over them of the distillation term, KL(guide || student), without its weight.
        guide_entropy: Sum over them of the entropy of the guide's distribution, in nats.
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
    client_cached_pairs: int = 0
    skipped_pairs: int = 0
    preselected_pairs: int = 0
    late_choices: int = 0
    late_pairs: int = 0
    probed_pairs: int = 0
    missed_masks: float = 0.0
    rounds: int = 0
    reconnects: int = 0
    servers: int = 0
    wait_seconds: float = 0.0
    positive_scores: float = 0.0
    negative_scores: float = 0.0
    unscored_fraction: float = 0.0
    capped_anchors: int = 0
    distilled_anchors: int = 0
    distillation_loss: float = 0.0
    guide_entropy: float = 0.0

    remembered_pairs = former_attribute("remembered_pairs", "client_cached_pairs")
    seconds_waited = former_attribute("seconds_waited", "wait_seconds")
    unscored_share = former_attribute("unscored_share", "unscored_fraction")

    def add(self, other: LossStatistics) -> None:
        """Add the counts of ``other`` to these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def since(self, earlier: LossStatistics) -> LossStatistics:
        """Return these counts less those of ``earlier``."""
        return LossStatistics(
            **{field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)}
        )

    def reset(self) -> None:
        """Set every count to zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)
