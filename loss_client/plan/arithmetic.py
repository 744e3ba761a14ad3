"""Arithmetic of a plan: pairs of a batch, seconds of scoring, time of a step, and servers that keep up.

Notation as in docs/cost.md: T is the time of a training step without a reranker, S the time in which one server scores
the pairs of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loss_client.plan.batch import Batch
from loss_client.plan.wire import Texts, wire_bytes

Candidates = Literal["all", "nearest"]
"""Modes of the loss."""

TOP_P = 0.999
"""Value of ``top_p`` in a report."""

TOP_P_SHARES = {0.01: 0.040, 0.02: 0.093, 0.05: 0.713}
"""Share of all pairs that are scored with ``top_p=0.999`` and no preselector, by temperature: an estimate.

Measured with 1,024 docstrings and all-MiniLM-L6-v2 (docs/loss-performance.md, rows "minilm"). Other texts and models
need other shares; a model at the start of its training needs more.
"""
TOP_P_WAIT = 1.05
"""Longest step with ``top_p`` that counts as one without a wait, in units of T.

Pairs are chosen when the batch is embedded, so that some wait remains however many servers there are.
"""
_TOP_P_STREAMS = 3  # the documents of each anchor's own row, and two rounds (docs/loss-performance.md)


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of one server.

    Attributes:
        rate: Pairs a second; of a bi-encoder, texts a second.
        by_text: Whether the rate counts texts. A bi-encoder embeds each text once, however many pairs it is in.

    Raises:
        ValueError: The rate is not a positive number.
    """

    rate: float
    by_text: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"the rate is {self.rate}; it has to be a positive number")

    def seconds(self, batch: Batch, pairs: float) -> float:
        """Return the time in which one server scores ``pairs`` pairs of a batch."""
        return (batch.texts if self.by_text else pairs) / self.rate


@dataclass(frozen=True, slots=True)
class Mode:
    """Pairs that one mode of the loss scores in a step.

    Attributes:
        candidates: Value of the loss's argument; None for the pairs of each row's own documents, which every mode
            scores first.
        name: Name of the mode in a report.
        ahead: Pairs that are known a batch ahead, so that they are scored while the batch before them trains.
        late: Pairs that are known when the batch is embedded. The step waits for their scores.
        per_anchor: Pairs beyond the own documents, in the mean of an anchor; None where the mode has no such argument.
        estimated: Whether the number of pairs is an estimate; see ``TOP_P_SHARES``.
    """

    candidates: Candidates | None
    name: str
    ahead: int
    late: int = 0
    per_anchor: float | None = None
    estimated: bool = False

    @property
    def pairs(self) -> int:
        """All pairs of a step."""
        return self.ahead + self.late


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one mode.

    Attributes:
        mode: The mode.
        scoring_seconds: S: seconds in which one server scores the pairs of a step.
        step_seconds: Seconds of a step with the servers of the plan.
        servers_without_wait: Servers with which a step takes T; with pairs that are known late, ``TOP_P_WAIT`` times T.
        bytes: Bytes of a step on the wire, both directions together.
        gpu_hours: Servers of the plan times hours of an epoch; None where the number of steps is not known.
    """

    mode: Mode
    scoring_seconds: float
    step_seconds: float
    servers_without_wait: int
    bytes: int
    gpu_hours: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A training run and the servers that it may use.

    Attributes:
        batch: Sizes of a step.
        train_seconds: T: seconds of a step without a reranker.
        speed: Speed of one server. Several servers are assumed to be as fast as their number times one server.
        servers: Servers that there are.
        texts: Sizes of the texts.
        chunk_pairs: Most pairs of a chunk, if the server prefers a number; None: as many as the client takes by itself.
        steps: Steps of an epoch; None if they are not known.

    Raises:
        ValueError: A number is out of range.
    """

    batch: Batch
    train_seconds: float
    speed: Speed
    servers: int
    texts: Texts
    chunk_pairs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.train_seconds < math.inf:
            raise ValueError(f"train_seconds is {self.train_seconds}; it has to be a positive number")
        for name, least in (("servers", 1), ("chunk_pairs", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it has to be {least} or more")

    def all_pairs(self) -> Mode:
        """Return the mode ``candidates="all"``."""
        return Mode("all", "all", self.batch.pairs)

    def own_documents(self) -> Mode:
        """Return the pairs of each anchor with the documents of its row, which every mode scores."""
        return Mode(None, "own documents only", self.batch.own)

    def nearest(self, per_anchor: float) -> Mode:
        """Return the mode ``candidates="nearest"`` with a number of further pairs an anchor.

        Args:
            per_anchor: The mean number of pairs an anchor beyond its own documents. There are at most all pairs.
        """
        pairs = min(self.batch.own + round(per_anchor * self.batch.anchors), self.batch.pairs)
        return self._nearest(pairs, f"{per_anchor:g}")

    def nearest_auto(self) -> Mode:
        """Return the mode ``candidates="nearest"`` with ``per_anchor="auto"``: what is scored while a step trains."""
        if self.speed.by_text:
            # Further pairs of the same texts take a bi-encoder no time.
            return self._nearest(self.batch.pairs, "auto")
        in_time = math.floor(self.speed.rate * self.servers * self.train_seconds)
        return self._nearest(min(max(in_time, self.batch.own), self.batch.pairs), "auto")

    def _nearest(self, pairs: int, per_anchor: str) -> Mode:
        extra = (pairs - self.batch.own) / self.batch.anchors
        return Mode("nearest", f"nearest, per_anchor {per_anchor}", pairs, per_anchor=extra)

    def top_p(self) -> list[Mode]:
        """Return ``candidates="nearest"`` with ``top_p`` alone, at each temperature of ``TOP_P_SHARES``."""
        own = self.batch.own
        return [
            Mode(
                "nearest",
                f"nearest, top_p {TOP_P:g}, T {temperature:g}",
                own,
                max(round(share * self.batch.pairs) - own, 0),
                None,
                True,
            )
            for temperature, share in TOP_P_SHARES.items()
        ]

    def cost(self, mode: Mode) -> Cost:
        """Return what a mode costs."""
        ahead, late = self._seconds(mode)
        train = self.train_seconds
        # With prefetch the pairs that are known ahead are scored while a step trains; the late ones add to the step.
        step = max(train, ahead / self.servers) + late / self.servers
        needed = max((ahead + late) / train, 1.0)
        if late:
            needed = max(late / ((TOP_P_WAIT - 1) * train), (ahead + late) / (TOP_P_WAIT * train), 1.0)
        listed = mode.candidates != "all"
        return Cost(
            mode=mode,
            scoring_seconds=ahead + late,
            step_seconds=step,
            servers_without_wait=math.ceil(needed - 1e-9),
            bytes=wire_bytes(
                self.batch, self.texts, mode.pairs, self.chunk_pairs, listed, _TOP_P_STREAMS if mode.late else 1
            ),
            gpu_hours=None if self.steps is None else self.servers * self.steps * step / 3600,
        )

    def _seconds(self, mode: Mode) -> tuple[float, float]:
        """Return the time in which one server scores the pairs known ahead, and the late ones."""
        if self.speed.by_text:
            return self.speed.seconds(self.batch, mode.pairs), 0.0
        return self.speed.seconds(self.batch, mode.ahead), self.speed.seconds(self.batch, mode.late)
