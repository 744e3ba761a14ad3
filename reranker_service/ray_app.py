"""Ray Serve application: ``serve run reranker_service.ray_app:app`` serves a reranker behind Serve's gRPC ingress.

A replica loads the model of the settings and answers the four RPCs of ``reranker.v1.RerankerService`` with the servicer
of the stand-alone server. Ray places and autoscales the replicas. Serve's own gRPC server takes the calls: it has no
tokens and no TLS, and hands each message of a stream to the replica in an actor call of its own. So a replica advises
clients to send large chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from reranker.v1 import reranker_pb2 as pb

from . import devices
from .loading import Loaded, load
from .observing.metrics import Metrics
from .rpc.admission import Admission
from .rpc.errors import RerankError, as_rerank_error
from .rpc.servicer import RerankerServicer
from .scoring import Scorer
from .server import open_servicer, start_engine
from .settings import Settings

PREFERRED_CHUNK_PAIRS = 4096
"""Pairs of a chunk that clients are advised to send if the settings name no number."""
TARGET_PAIRS = 16_384
"""Pairs in flight of one replica that autoscaling aims at, if ``target_pairs`` is not given."""
PAIRS_METRIC = "pairs_in_flight"
"""Name of the metric that autoscaling reads."""
# Replies that wait for Serve to take them. More would hide a client that does not read.
_WAITING_REPLIES = 2
# Settings of the stand-alone server's ports, which Serve's ingress replaces.
_NOT_FOR_RAY = frozenset(
    {
        *("host", "port", "metrics_port", "tls_cert", "tls_key", "tls_client_ca", "token_file", "insecure_network"),
        *("reflection", "replicas", "tracing", "accept_compressed", "max_connection_calls", "max_metadata_bytes"),
    }
)


class Reranker:
    """One replica: a model, its engine and the servicer.

    Args:
        settings: The settings, as keyword arguments of ``Settings``.
    """

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        # Serve awaits it.
        self._settings = Settings(**settings)
        self._dead: asyncio.Task[Exception] | None = None
        admission = Admission(
            self._settings.memory_bytes, self._settings.max_streams, self._settings.stream_idle_seconds
        )
        self._servicer = RerankerServicer(admission=admission)
        self._loaded: Loaded = await asyncio.to_thread(self.load, self._settings)
        await start_engine(self._loaded)
        self._scorer: Scorer = await open_servicer(self._settings, self._loaded, self._servicer, Metrics())
        self._dead = asyncio.ensure_future(self._loaded.engine.wait_dead())

    def load(self, settings: Settings) -> Loaded:
        """Load the model and make its engine; see ``loading.load``."""
        return load(settings)

    async def Rerank(self, request: pb.RerankRequest, grpc_context: RayServegRPCContext) -> pb.RerankResponse:
        """Answer ``Rerank``."""
        with _status(grpc_context):
            return await self._servicer.rerank(request)
        raise AssertionError("the context raises every error")

    async def RerankBatch(
        self, request: pb.RerankBatchRequest, grpc_context: RayServegRPCContext
    ) -> pb.RerankBatchResponse:
        """Answer ``RerankBatch``."""
        with _status(grpc_context):
            return await self._servicer.rerank_batch(request)
        raise AssertionError("the context raises every error")

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        """Answer ``GetModelInfo``."""
        with _status(grpc_context):
            return await self._servicer.get_model_info(request)
        raise AssertionError("the context raises every error")

    async def RerankStream(
        self, request_stream: gRPCInputStream[pb.RerankStreamRequest], grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.RerankStreamResponse]:
        """Answer ``RerankStream``."""
        replies: asyncio.Queue[pb.RerankStreamResponse] = asyncio.Queue(_WAITING_REPLIES)
        session = asyncio.ensure_future(self._servicer.rerank_stream(request_stream, replies.put))
        try:
            while not session.done() or not replies.empty():
                reading = asyncio.ensure_future(replies.get())
                waiting: set[asyncio.Future[Any]] = {reading, session}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if reading.done() or not replies.empty():
                    yield await reading
                else:
                    reading.cancel()
            with _status(grpc_context):
                await session
        finally:
            session.cancel()
            await asyncio.wait({session})

    async def check_health(self) -> None:
        """Raise the error of an engine that has died: Serve then replaces this replica."""
        if self._dead is not None and self._dead.done():
            raise self._dead.result()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the pairs in flight to the autoscaler."""
        return {PAIRS_METRIC: float(self._servicer.pairs_in_flight)}

    async def __del__(self) -> None:
        if self._dead is not None:
            self._dead.cancel()
            self._scorer.close()
            await self._loaded.engine.close()


@contextlib.contextmanager
def _status(context: RayServegRPCContext) -> Any:
    """End the call with the status of the error that the block raises."""
    try:
        yield
    except Exception as error:
        known = as_rerank_error(error)
        context.set_code(known.code)
        context.set_details(known.message)
        raise RerankError(known.message, known.code) from None


class PairsInFlight:
    """Autoscaling policy: as many replicas as keep the mean of the pairs in flight at a target.

    Args:
        target_pairs: Pairs in flight of one replica.
    """

    def __init__(self, target_pairs: int) -> None:
        self.target_pairs = target_pairs

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas; Serve applies bounds and delays."""
        metrics = context.aggregated_metrics or {}
        pairs = sum(metrics.get(PAIRS_METRIC, {}).values())
        return max(math.ceil(pairs / self.target_pairs), 1), {}


def application(replica: type[Reranker], arguments: Mapping[str, Any]) -> serve.Application:
    """Make an application.

    Args:
        replica: The class of a replica.
        arguments: Settings of the server under their names, such as ``model`` and ``engine_args``, and three of the
            deployment: ``min_replicas`` (1), ``max_replicas`` (default: one for each GPU of the cluster, or 1) and
            ``target_pairs`` (16,384).

    Raises:
        ValueError: An argument is wrong, or Serve's ingress decides what it asks for.
    """
    given = dict(arguments)
    least, most = int(given.pop("min_replicas", 1)), given.pop("max_replicas", None)
    target = int(given.pop("target_pairs", TARGET_PAIRS))
    if wrong := sorted(_NOT_FOR_RAY & given.keys()):
        raise ValueError(f"Serve's ingress takes the calls: leave out {', '.join(wrong)}")
    given.setdefault("preferred_chunk_pairs", PREFERRED_CHUNK_PAIRS)
    settings = Settings(**given)
    gpus = _gpus_of_cluster() if settings.device != "cpu" else 0
    each = devices.gpus_of_one_server(settings.engine_args) if gpus else 0
    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=max(int(most) if most is not None else gpus // each if each else 1, least),
        policy=AutoscalingPolicy(policy_function=PairsInFlight, policy_kwargs={"target_pairs": target}),
        upscale_delay_s=10.0,
        downscale_delay_s=300.0,  # a model takes a minute to load
    )
    deployment = serve.deployment(
        replica,
        name="Reranker",
        ray_actor_options={"num_gpus": each, "num_cpus": 1},
        # The servicer limits streams and bytes itself, with errors that clients understand.
        max_ongoing_requests=settings.max_streams,
        autoscaling_config=scaling,
        graceful_shutdown_timeout_s=settings.graceful_timeout,
        health_check_period_s=5.0,
    )
    return deployment.bind(given)


def app(arguments: dict[str, str]) -> serve.Application:
    """Make the application of ``serve run reranker_service.ray_app:app NAME=VALUE ...``; see ``application``."""
    return application(Reranker, arguments)


def _gpus_of_cluster() -> int:
    if not ray.is_initialized():
        return len(devices.visible_gpus(os.environ))
    return int(ray.cluster_resources().get("GPU", 0))
