"""Metrics for Prometheus: their names, units and buckets.

Names follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): one prefix, base units, ``_total``
for counters. The page also has the metrics that other libraries of the process register (vLLM, the process collector).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .metrics import Call, Load, Metrics, ReplyUsage

# 1 ms to 5 minutes: from a small reply on a GPU to a large chunk on a laptop, behind other work.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SEQUENCES = tuple(1 << power for power in range(13))  # 1 to 4,096
TOKENS = tuple(1 << power for power in range(4, 20))  # 16 to 524,288


class PrometheusMetrics(Metrics):
    """Counts events in Prometheus' data types.

    Attributes:
        registry: The metrics of this server and of the process's default registry.
    """

    def __init__(self, rpcs: Sequence[str], scoring_rpcs: Sequence[str]) -> None:
        """Make the metrics.

        Args:
            rpcs: Names of all RPCs.
            scoring_rpcs: Names of the RPCs that score pairs.
        """
        # Otherwise every counter has a second series with the time at which it was made.
        disable_created_metrics()
        registry = CollectorRegistry(support_collectors_without_names=True)
        self.registry = registry
        self._requests = Counter("reranker_requests", "Calls that have ended.", ["rpc", "code"], registry=registry)
        self._duration = Histogram(
            "reranker_request_duration_seconds",
            "Time that a call took; for a stream its whole life.",
            ["rpc"],
            buckets=SECONDS,
            registry=registry,
        )
        self._open = Gauge("reranker_requests_in_progress", "Calls in progress.", ["rpc"], registry=registry)
        self._replies = Counter(
            "reranker_replies",
            "Replies to rankings, requests of a batch and chunks of a stream, by status.",
            ["rpc", "code"],
            registry=registry,
        )
        self._pairs = Counter(
            "reranker_pairs",
            "Pairs in replies, by source of the score: engine, cache, or an identical pair (shared).",
            ["rpc", "source"],
            registry=registry,
        )
        self._truncated = Counter(
            "reranker_truncated_pairs",
            "Pairs from the engine with a text that was truncated.",
            ["rpc"],
            registry=registry,
        )
        self._tokens = Counter(
            "reranker_tokens", "Tokens given to the model for the pairs in replies.", ["rpc"], registry=registry
        )
        self._encoded = Counter("reranker_encoded_texts", "Texts that were tokenized.", registry=registry)
        self._queue_seconds = self._stage(
            "queue", "from the arrival of a reply's pairs until the first one entered the engine"
        )
        self._encoding_seconds = self._stage("encoding", "of one run of the tokenizer")
        self._engine_seconds = self._stage("engine", "from a reply's first pair entering the engine to its last score")
        self._reply_seconds = self._stage(
            "reply", "from a reply's last score until gRPC took it, waiting for a slow reader included"
        )
        self._batch_sequences = Histogram(
            "reranker_batch_sequences",
            "Sequences that entered the engine together: pairs, for bi-encoders texts.",
            buckets=SEQUENCES,
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "reranker_batch_tokens", "Tokens that entered the engine together.", buckets=TOKENS, registry=registry
        )
        self._up = Gauge("reranker_engine_up", "1 while the engine answers, else 0.", registry=registry)
        self._info = Info("reranker_model", "The served model.", registry=registry)
        self._load = _LoadCollector()
        registry.register(self._load)
        registry.register(REGISTRY)
        # Makes the series with 0: rate() misses the first count of a series that appears together with it.
        for rpc in rpcs:
            self._requests.labels(rpc, "OK")
            self._duration.labels(rpc)
            self._open.labels(rpc)
        for rpc in scoring_rpcs:
            self._replies.labels(rpc, "OK")
            self._truncated.labels(rpc)
            self._tokens.labels(rpc)
            for source in ("engine", "cache", "shared"):
                self._pairs.labels(rpc, source)

    def _stage(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"reranker_{name}_seconds", f"Time {meaning}.", buckets=SECONDS, registry=self.registry)

    def call(self, rpc: str) -> AbstractContextManager[Call]:
        """See ``Metrics.call``."""
        return self._call(rpc)

    @contextmanager
    def _call(self, rpc: str) -> Iterator[Call]:
        call, began = Call(), monotonic()
        self._open.labels(rpc).inc()
        try:
            yield call
        finally:
            self._open.labels(rpc).dec()
            self._duration.labels(rpc).observe(monotonic() - began)
            self._requests.labels(rpc, call.code).inc()

    def reply(self, rpc: str, usage: ReplyUsage) -> None:
        """See ``Metrics.reply``."""
        self._replies.labels(rpc, "OK").inc()
        self._pairs.labels(rpc, "cache").inc(usage.cached_pairs)
        self._pairs.labels(rpc, "shared").inc(usage.shared_pairs)
        self._pairs.labels(rpc, "engine").inc(usage.pairs - usage.cached_pairs - usage.shared_pairs)
        self._truncated.labels(rpc).inc(usage.truncated_pairs)
        self._tokens.labels(rpc).inc(usage.tokens)
        self._queue_seconds.observe(usage.queue_seconds)
        self._engine_seconds.observe(usage.engine_seconds)

    def refusal(self, rpc: str, code: str) -> None:
        """See ``Metrics.refusal``."""
        self._replies.labels(rpc, code).inc()

    def sent(self, seconds: float) -> None:
        """See ``Metrics.sent``."""
        self._reply_seconds.observe(seconds)

    def encoded(self, seconds: float, texts: int) -> None:
        """See ``Metrics.encoded``."""
        self._encoding_seconds.observe(seconds)
        self._encoded.inc(texts)

    def batch(self, sequences: int, tokens: int) -> None:
        """See ``Metrics.batch``."""
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)

    def watch(self, read: Callable[[], Load]) -> None:
        """See ``Metrics.watch``."""
        self._load.read = read

    def serving(self, labels: Mapping[str, str]) -> None:
        """See ``Metrics.serving``."""
        self._info.info(dict(labels))
        self._up.set(1)

    def engine_gone(self) -> None:
        """See ``Metrics.engine_gone``."""
        self._up.set(0)


class _LoadCollector(Collector):
    """Reads the load once for each request, so that its figures are of one moment."""

    def __init__(self) -> None:
        self.read: Callable[[], Load] = Load

    def collect(self) -> Iterable[Metric]:
        load = self.read()
        yield GaugeMetricFamily("reranker_queue_sequences", "Sequences waiting for the engine.", load.waiting)
        yield GaugeMetricFamily(
            "reranker_queue_age_seconds",
            "Time that the oldest waiting job has waited; 0 if none waits.",
            load.oldest_seconds,
        )
        yield GaugeMetricFamily("reranker_engine_sequences", "Sequences inside the engine.", load.running)
        yield GaugeMetricFamily("reranker_cache_bytes", "Bytes that the cache takes up.", load.cache_bytes)
        yield GaugeMetricFamily(
            "reranker_held_bytes",
            "Bytes held for clients: texts, token ids, chunks in flight and replies that were not read.",
            load.held_bytes,
        )
