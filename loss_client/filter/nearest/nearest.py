"""Nearest: begins the choice of preselected pairs for the batches of one loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np

from loss_client.filter.jobs import AskForPairs, ScoreRows
from loss_client.filter.nearest.choice import Side, choose
from loss_client.filter.nearest.pace import Pace
from loss_client.filter.nearest.preselection import Preselection
from loss_client.filter.nearest.preselector import Preselector
from loss_client.filter.nearest.worker import Worker

PerAnchor = float | Literal["auto"]
"""Mean number of preselected pairs of an anchor; ``"auto"``: as many as the servers can score while a step trains."""

#: Random pairs of a batch that are scored to estimate how many masks are missed.
DRAWN = 8


class Nearest:
    """Chooses pairs by a preselector, one batch after the other, in a background thread.

    Args:
        preselector: Compares anchors with documents. Without one no pair is chosen; only random ones are drawn.
    """

    def __init__(self, preselector: Preselector | None) -> None:
        self._preselector = preselector
        self._worker = Worker()
        self._pace = Pace()
        # Its own generator: the training's random numbers stay the same.
        self._generator = np.random.default_rng(0)

    def begin(
        self,
        columns: Sequence[Sequence[str]],
        merged: Sequence[Sequence[str]],
        *,
        per_anchor: PerAnchor,
        contrast: tuple[bool, bool],
        ask: AskForPairs,
    ) -> Preselection:
        """Begin to choose pairs of a batch, which are scored as soon as they are chosen; returns at once.

        Args:
            columns: This rank's texts by column, anchors first.
            merged: The columns themselves: pairs of this rank's documents are chosen. The columns of all ranks: pairs
                of this rank's anchors with the other ranks' documents are.
            per_anchor: Mean number of pairs for each anchor and each rank's documents. ``"auto"``: one number for this
                rank's documents and the same for all others together; pairs that are late are left out.
            contrast: Whether pairs of anchors and pairs of positives, in this order, are scored too.
            ask: Begins the scoring job.
        """
        rows = len(columns[0])
        if self._preselector is None:
            per_anchor = 0
        if per_anchor == "auto":
            count = self._pace.per_anchor * rows
        else:
            count = per_anchor * (rows if merged is columns else len(merged[0]) - rows)
        work = partial(
            choose, self._preselector, sides_of(columns, merged, contrast), round(count), DRAWN, self._generator
        )
        return Preselection(self._worker, work, ask, patient=per_anchor != "auto")

    def take(self, training: bool) -> None:
        """Note that the loss begins to work on a step; see :class:`Pace`."""
        self._pace.take(training)

    def record(self, anchors: int, jobs: Sequence[ScoreRows]) -> None:
        """Take the measurements of a step that the loss has worked on.

        Args:
            anchors: Number of anchors.
            jobs: The step's jobs; the first one is that of the anchors' own documents.
        """
        ahead = next((job.ahead for job in jobs if isinstance(job, Preselection)), None)
        self._pace.record(anchors, jobs, ahead, sum(job.wait_seconds for job in jobs))


def sides_of(
    columns: Sequence[Sequence[str]], merged: Sequence[Sequence[str]], contrast: tuple[bool, bool]
) -> list[Side]:
    """Return the queries and documents among whose pairs is chosen; for the arguments see :meth:`Nearest.begin`."""
    anchors, positives = columns[:2]
    own: list[Sequence[str]] = list(columns[1:])
    documents, known = list(chain(*merged[1:])), [] if merged is columns else list(chain(*columns[1:]))
    if contrast[0]:
        texts = set(documents)
        # The pair of an anchor with itself needs no score, unless the text is a document as well.
        own.append(
            [positive if anchor in texts else anchor for anchor, positive in zip(anchors, positives, strict=True)]
        )
        documents += merged[0]
        known += [] if merged is columns else anchors
    sides = [Side(anchors, own, documents, known)]
    if contrast[1]:
        sides.append(Side(positives, [positives], merged[1], [] if merged is columns else positives))
    return sides
