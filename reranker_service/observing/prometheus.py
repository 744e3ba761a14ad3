"""The server's metrics for Prometheus: their names, units and buckets, and the port where they are read.

Names follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): one prefix, base units, ``_total``
for counters. What other libraries of the process register (vLLM, the process collector) is on the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from time import monotonic

from grpc import StatusCode
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reranker.v1 import reranker_pb2 as pb

from .metrics import Call, Load, Metrics

RPCS = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["RerankerService"].methods)
SCORING_RPCS = tuple(rpc for rpc in RPCS if rpc != "GetModelInfo")
# 1 ms to 5 minutes: from one small reply on a GPU to a large chunk on a laptop that has to wait for others.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SEQUENCES = tuple(1 << power for power in range(13))  # 1 to 4,096
TOKENS = tuple(1 << power for power in range(4, 20))  # 16 to 524,288


class PrometheusMetrics(Metrics):
    """Counts what it is told; ``registry`` gives the counts to whoever reads them.

    Attributes:
        registry: This server's metrics and those of the process's default registry.
    """

    def __init__(self) -> None:
        # When a counter was made, as a series of its own for every series: Prometheus itself has no use for it.
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
        self._open = Gauge("reranker_requests_in_progress", "Calls that are under way.", ["rpc"], registry=registry)
        self._replies = Counter(
            "reranker_replies",
            "Rankings, requests of a batch and chunks of a stream that were answered, each with a status of its own.",
            ["rpc", "code"],
            registry=registry,
        )
        self._pairs = Counter(
            "reranker_pairs",
            "Pairs answered, by where the score came from: the engine, the cache, or an identical pair (shared).",
            ["rpc", "source"],
            registry=registry,
        )
        self._truncated = Counter(
            "reranker_truncated_pairs",
            "Pairs with a text that was cut to fit; of those from the engine.",
            ["rpc"],
            registry=registry,
        )
        self._tokens = Counter(
            "reranker_tokens", "Tokens given to the model for what was answered.", ["rpc"], registry=registry
        )
        self._encoded = Counter("reranker_encoded_texts", "Texts that were tokenized.", registry=registry)
        self._queue_seconds = self._stage("queue", "from the arrival of a reply's pairs until the first of them ran")
        self._encoding_seconds = self._stage("encoding", "taken by one run of the tokenizer")
        self._engine_seconds = self._stage("engine", "from a reply's first pair entering the engine to its last score")
        self._reply_seconds = self._stage(
            "reply", "from a reply's last score until it was handed to the network, waiting for a slow reader included"
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
        self._up = Gauge("reranker_engine_up", "Whether the engine answers: 1, or 0.", registry=registry)
        self._info = Info("reranker_model", "The served model.", registry=registry)
        self._load = _LoadCollector()
        registry.register(self._load)
        registry.register(REGISTRY)
        # A series that appears only with its first count hides that count from rate().
        for rpc in RPCS:
            self._requests.labels(rpc, "OK")
            self._duration.labels(rpc)
            self._open.labels(rpc)
        for rpc in SCORING_RPCS:
            self._replies.labels(rpc, "OK")
            self._truncated.labels(rpc)
            self._tokens.labels(rpc)
            for source in ("engine", "cache", "shared"):
                self._pairs.labels(rpc, source)

    def _stage(self, name: str, what: str) -> Histogram:
        return Histogram(f"reranker_{name}_seconds", f"Time {what}.", buckets=SECONDS, registry=self.registry)

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
            self._requests.labels(rpc, call.code.name).inc()

    def reply(self, rpc: str, usage: pb.Usage) -> None:
        """See ``Metrics.reply``."""
        self._replies.labels(rpc, "OK").inc()
        self._pairs.labels(rpc, "cache").inc(usage.cached_pairs)
        self._pairs.labels(rpc, "shared").inc(usage.shared_pairs)
        self._pairs.labels(rpc, "engine").inc(usage.pairs - usage.cached_pairs - usage.shared_pairs)
        self._truncated.labels(rpc).inc(usage.truncated_pairs)
        self._tokens.labels(rpc).inc(usage.tokens)
        self._queue_seconds.observe(usage.queue_seconds)
        self._engine_seconds.observe(usage.engine_seconds)

    def refusal(self, rpc: str, code: StatusCode) -> None:
        """See ``Metrics.refusal``."""
        self._replies.labels(rpc, code.name).inc()

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

    def serving(self, info: pb.GetModelInfoResponse) -> None:
        """See ``Metrics.serving``."""
        self._info.info(
            {
                "model": info.model,
                "kind": pb.ModelKind.Name(info.kind).removeprefix("MODEL_KIND_").lower().replace("_", "-"),
                "engine": info.engine,
                "dtype": info.dtype,
                "fingerprint": info.fingerprint,
                "version": metadata.version("reranker-grpc"),
            }
        )
        self._up.set(1)

    def engine_gone(self) -> None:
        """See ``Metrics.engine_gone``."""
        self._up.set(0)


class _LoadCollector(Collector):
    """Reads the load once for each look at it, so that its figures belong together."""

    def __init__(self) -> None:
        self.read: Callable[[], Load] = Load

    def collect(self) -> Iterable[Metric]:
        load = self.read()
        yield GaugeMetricFamily("reranker_queue_sequences", "Sequences that wait for the engine.", load.waiting)
        yield GaugeMetricFamily(
            "reranker_queue_age_seconds",
            "How long the oldest of them has waited; 0 if none.",
            load.oldest_seconds,
        )
        yield GaugeMetricFamily("reranker_engine_sequences", "Sequences inside the engine.", load.running)
        yield GaugeMetricFamily("reranker_cache_bytes", "Bytes that the cache takes up.", load.cache_bytes)


class MetricsServer:
    """Gives ``metrics`` to whoever asks, over HTTP, from a thread of its own; any path will do.

    Attributes:
        address: Where it listens, ``host:port``.
    """

    def __init__(self, metrics: PrometheusMetrics, host: str, port: int) -> None:
        """Listen. Port 0 picks a free one. Raises ``OSError`` where that cannot be done."""
        self._server, self._thread = start_http_server(port, host, metrics.registry)
        self.address = f"[{host}]:{self._server.server_port}" if ":" in host else f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Listen no more; takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
