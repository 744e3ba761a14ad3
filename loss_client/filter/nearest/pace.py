"""Pace: number of pairs that the servers can score while a step trains, measured over the last steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from loss_client.filter.jobs import ScoreRows

FIRST = 4.0
"""Pairs an anchor, beside its own documents, before anything has been measured."""

_STEPS = 8
# Part of the measured capacity that is used: pairs beyond it would arrive late, and delay the next batch's.
_USED = 0.9


@dataclass(frozen=True, slots=True)
class _Measured:
    """Measurements of one step.

    Attributes:
        anchors: Number of anchors.
        own: Pairs of the anchors' own documents that servers scored.
        pairs: All pairs that servers scored.
        spans: Times at which the step's jobs began and ended.
    """

    anchors: int
    own: int
    pairs: int
    spans: tuple[tuple[float, float], ...]


class Pace:
    """Says how many preselected pairs to ask for.

    The number is the speed of the servers times the time that they have, less the anchors' own documents. The speed is
    the number of pairs that servers scored over the time in which a job was in flight, over the last eight training
    steps together. The time is the median time of a step without its waiting or, if that is shorter, between the
    request for the preselected pairs and their use, as in training without prefetch.

    Args:
        clock: Returns the time in seconds, on the clock of the jobs' spans.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._measured: deque[_Measured] = deque(maxlen=_STEPS)
        self._steps: deque[float] = deque(maxlen=_STEPS)  # seconds of a step without its waiting
        self._ahead: deque[float] = deque(maxlen=_STEPS)  # seconds between request and use
        self._taken: float | None = None
        self._waited = 0.0
        self._per_anchor = FIRST

    @property
    def per_anchor(self) -> float:
        """Pairs to ask for, 0 or more for each anchor in the mean, beside its own documents."""
        return self._per_anchor

    def take(self, training: bool) -> None:
        """Note that the loss begins to work on a step.

        Args:
            training: Whether the step trains. Other steps, and the time between them, are not measured.
        """
        now = self._clock()
        if training and self._taken is not None:
            self._steps.append(max(0.0, now - self._taken - self._waited))
        self._taken = now if training else None

    def record(self, anchors: int, jobs: Sequence[ScoreRows], ahead: float | None, waited: float) -> None:
        """Take the measurements of a step that the loss has worked on, and set ``per_anchor`` anew.

        Args:
            anchors: Number of anchors.
            jobs: The step's jobs. The first one is that of the anchors' own documents.
            ahead: Seconds between the request for the preselected pairs and their use; ``None`` if there was none.
            waited: Seconds that the step waited for scores.
        """
        if self._taken is None:
            return
        self._waited = waited
        counts = [job.usage.pairs - job.usage.client_cached_pairs for job in jobs]
        self._measured.append(_Measured(anchors, counts[0], sum(counts), tuple(job.span for job in jobs)))
        if ahead is not None:
            self._ahead.append(ahead)
        busy = _covered(span for one in self._measured for span in one.spans)
        scored = sum(one.pairs for one in self._measured)
        if not self._steps or not busy or not scored:
            return
        seconds = min([median(self._steps), *([median(self._ahead)] if self._ahead else [])])
        left = _USED * scored / busy * seconds - median(one.own for one in self._measured)
        self._per_anchor = max(0.0, left / median(one.anchors for one in self._measured))


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans, each from begin to end."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
