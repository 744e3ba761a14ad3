"""Metrics page of a server, read into the figures of one moment and of the time between two moments."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "reranker_"


@dataclass(frozen=True, slots=True)
class Page:
    """The metrics of one moment.

    Attributes:
        when: Time of the reading, on the clock of ``time.monotonic``.
        sums: Sum over all series of a metric, by name without ``reranker_``.
        by_source: Pairs by the source of their scores: ``engine``, ``cache`` and ``shared``.
        streams: Open streams.
        model: The served model's name; empty while it loads.
    """

    when: float
    sums: dict[str, float] = field(default_factory=dict)
    by_source: dict[str, float] = field(default_factory=dict)
    streams: int = 0
    model: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a server.

    Attributes:
        state: ``"serving"``, or ``"not serving"`` while the model loads and after the engine has died.
        model: The served model's name; empty while it loads.
        pairs_per_second: Pairs in replies, per second of the time between the readings.
        cached_share: Share of these pairs whose score came from a cache, in [0, 1]; ``None`` without pairs.
        waiting: Sequences that wait for the engine.
        oldest_seconds: Time that the oldest waiting job has waited.
        running: Sequences inside the engine.
        streams: Open streams.
        held_bytes: Bytes held for clients.
    """

    state: str
    model: str
    pairs_per_second: float
    cached_share: float | None
    waiting: int
    oldest_seconds: float
    running: int
    streams: int
    held_bytes: int


def parse(text: str) -> Page:
    """Read the text of a page.

    Raises:
        ValueError: It is no page of metrics of a reranker server.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    by_source: defaultdict[str, float] = defaultdict(float)
    streams, model = 0, ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(_PREFIX):
                continue
            name = sample.name.removeprefix(_PREFIX)
            sums[name] += sample.value
            if name == "pairs_total":
                by_source[sample.labels["source"]] += sample.value
            elif name == "requests_in_progress" and sample.labels["rpc"] == "RerankStream":
                streams = int(sample.value)
            elif name == "model_info":
                model = sample.labels.get("model", "")
    if "engine_up" not in sums:
        raise ValueError("the page has no metric of a reranker server")
    return Page(time.monotonic(), dict(sums), dict(by_source), streams, model)


def figures(before: Page, now: Page) -> Figures:
    """Compute the figures of a server from two readings of its page.

    A server that was restarted between them counts from 0 again; its pairs since then are counted.
    """
    total = now.sums.get("pairs_total", 0.0)
    restarted = total < before.sums.get("pairs_total", 0.0)
    earlier = {} if restarted else before.by_source
    grown = {source: count - earlier.get(source, 0.0) for source, count in now.by_source.items()}
    pairs = sum(grown.values())
    return Figures(
        state="serving" if now.sums["engine_up"] else "not serving",
        model=now.model,
        pairs_per_second=pairs / max(now.when - before.when, 1e-9),
        cached_share=grown.get("cache", 0.0) / pairs if pairs else None,
        waiting=int(now.sums.get("queue_sequences", 0.0)),
        oldest_seconds=now.sums.get("queue_age_seconds", 0.0),
        running=int(now.sums.get("engine_sequences", 0.0)),
        streams=now.streams,
        held_bytes=int(now.sums.get("held_bytes", 0.0)),
    )
