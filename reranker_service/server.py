"""Server: runs one process from start-up to shutdown: listen, load, warm up, serve, drain.

The port is taken first, so that a port in use is an error at once, and so that probes get an answer (NOT_SERVING) while
the model loads. Health turns SERVING after a first real score, and NOT_SERVING again on SIGTERM, on SIGINT or when the
engine dies. Scoring calls in flight then get the grace period, the engine is closed, and the process exits: 0 after a
signal, 1 after a failure.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Coroutine, Sequence
from importlib import metadata
from typing import Any, TypeVar

import structlog
from grpc import aio
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection

from .engines import Engine
from .loading import Loaded, load
from .models import UnsupportedModelError, fingerprint
from .observing.logs import adopt_handlers
from .observing.metrics import Metrics
from .observing.notify import notify_ready
from .observing.observers import ObserverError, Observers, observers
from .rpc.admission import Admission
from .rpc.call_limit import CallLimit
from .rpc.listener import Listener, ListenError
from .rpc.messages import model_info
from .rpc.servicer import RPCS, SCORING_RPCS, SERVICE, RerankerServicer
from .rpc.standard import Health, Reflection
from .rpc.validation import Validator
from .scheduling import Scheduler, watch_stalls
from .scoring import Scorer, known_answer
from .scoring.disk import DiskCache, DiskCacheError
from .security import Guard, RequestIds, SecurityError
from .settings import Settings

T = TypeVar("T")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# HTTP/2 flow control: bytes of a stream that gRPC takes in before the server reads them.
_WINDOW_BYTES = 256 << 10
# Largest message, and most calls on one connection, of the port for health checks.
_HEALTH_BYTES = 4096
_HEALTH_CALLS = 16

log = structlog.get_logger()


async def serve(settings: Settings) -> int:
    """Run a server until it is told to stop.

    Returns:
        The process's exit status: 0 after SIGTERM or SIGINT, 1 if it could not start, its engine died or its port was
        lost, 2 if the flags for TLS and tokens are wrong.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        guard = Guard(
            host=settings.host,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            tls_client_ca=settings.tls_client_ca,
            token_file=settings.token_file,
            insecure_network=settings.insecure_network,
            reflection=settings.reflection,
        )
    except SecurityError as error:
        log.error("cannot start securely", reason=str(error))
        return 2
    watching = observers(
        SERVICE,
        RPCS,
        SCORING_RPCS,
        host=settings.host,
        metrics_port=settings.metrics_port,
        metrics_tls=guard.tls.context if guard.tls else None,
        metrics_token=guard.tokens.find if guard.tokens else None,
        tracing=settings.tracing,
    )
    try:
        with watching as observing:
            return await _serve(settings, guard, stop, observing)
    except ObserverError as error:
        log.error("cannot start metrics or tracing", reason=str(error))
        return 1


async def _serve(settings: Settings, guard: Guard, stop: asyncio.Event, observing: Observers) -> int:
    metrics = observing.metrics
    servicer = RerankerServicer(
        metrics, Admission(settings.memory_bytes, settings.max_streams, settings.stream_idle_seconds)
    )
    calls = CallLimit(SERVICE, SCORING_RPCS, settings.max_concurrent_rpcs, metrics)
    checks = Health()
    described = Reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME))
    await _set_health(checks, _NOT_SERVING)

    def refused(method: str) -> None:
        service, _, rpc = method[1:].partition("/")
        if service == SERVICE and rpc in RPCS:
            with metrics.call(rpc) as call:
                call.code = "UNAUTHENTICATED"

    access = guard.access(health=[health.SERVICE_NAME], reflection=[reflection.SERVICE_NAME], refused=refused)

    def make() -> aio.Server:
        # Refused calls get an id, and reach no other interceptor.
        server = _make_server(settings, (RequestIds(), access, calls, *observing.interceptors))
        server.add_generic_rpc_handlers((servicer.handler(), checks.handler(), described.handler()))
        return server

    host = _bracketed(settings.host)
    listener = Listener(make, lambda server, port: guard.listen(server, f"{host}:{port}"))
    probed = Listener(
        lambda: _make_health_server(checks), lambda server, port: server.add_insecure_port(f"{host}:{port}")
    )
    wanted = settings.port
    try:
        port = await listener.start(wanted)
        address = f"{host}:{port}"
        log.info("listening", address=address)
        if settings.health_port is not None:
            wanted = settings.health_port
            log.info("answering health checks without TLS", health=f"{host}:{await probed.start(wanted)}")
    except ListenError as error:
        log.error("cannot listen", host=settings.host, port=wanted, reason=str(error))
        await listener.stop(0.0)
        return 1
    listeners = [listener] if settings.health_port is None else [listener, probed]
    unserved = asyncio.create_task(_until_unserved(listeners, stop))
    watching = asyncio.create_task(guard.watch())

    began = time.monotonic()
    loaded: Loaded | None = None
    scorer: Scorer | None = None
    watchdog: asyncio.Task[None] | None = None
    status = 0
    try:
        if settings.cache_dir is not None:
            # An unusable directory is an error before the model is loaded.
            DiskCache.check(settings.cache_dir)
        # The objects made during the start stay. Looking through them for garbage takes a tenth of the start's time.
        gc.disable()
        # In a thread, because downloads and imports take long, and health probes must be answered meanwhile.
        prepared = await _unless(stop, asyncio.to_thread(load, settings))
        if prepared is None:
            return int(unserved.done())
        loaded = prepared.result()
        adopt_handlers()
        if not await _unless(stop, start_engine(loaded)):
            return int(unserved.done())
        scorer = await open_servicer(settings, loaded, servicer, metrics)
        await _set_health(checks, _SERVING)
        log.info(
            "ready",
            address=address,
            model=loaded.spec.name,
            kind=loaded.spec.kind,
            engine=loaded.engine.name,
            dtype=loaded.engine.dtype,
            seconds=round(time.monotonic() - began, 1),
        )
        notify_ready(address)
        if settings.stall_seconds:
            watchdog = asyncio.create_task(
                watch_stalls(
                    scorer.scheduler,
                    settings.stall_seconds,
                    lambda stalled: _set_health(checks, _NOT_SERVING if stalled else _SERVING),
                )
            )
        if await _unless(stop, _wait_dead(loaded.engine, metrics)):
            status = 1
    except (DiskCacheError, UnsupportedModelError) as error:
        log.error("cannot serve the model", reason=str(error))
        status = 1
    except Exception as error:
        log.error("cannot start", reason=f"{type(error).__name__}: {error}", exc_info=error)
        status = 1
    finally:
        if unserved.done():
            status = 1
        unserved.cancel()
        watching.cancel()
        if watchdog is not None:
            watchdog.cancel()
        await checks.enter_graceful_shutdown()
        log.info("stopping", graceful_timeout=settings.graceful_timeout)
        await listener.stop(settings.graceful_timeout if status == 0 else 0.5, calls.wait_idle())
        await probed.stop(0.0)
        if scorer is not None:
            scorer.close()
        if loaded is not None:
            await loaded.engine.close()
        log.info("stopped", status=status)
    return status


async def _until_unserved(listeners: Sequence[Listener], stop: asyncio.Event) -> None:
    """Set ``stop`` once one of the addresses is no longer served."""
    watching = [asyncio.create_task(one.watch()) for one in listeners]
    try:
        ended, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in watching:
            one.cancel()
    log.error("cannot go on listening", reason=str(ended.pop().result()))
    stop.set()


def _make_health_server(checks: Health) -> aio.Server:
    """Make the server of ``--health-port``, with health checks and no other service."""
    server = aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _HEALTH_BYTES),
            ("grpc.max_concurrent_streams", _HEALTH_CALLS),
        ]
    )
    server.add_generic_rpc_handlers((checks.handler(),))
    return server


def _make_server(settings: Settings, interceptors: Sequence[aio.ServerInterceptor]) -> aio.Server:
    size = settings.limits.max_message_bytes
    compression = () if settings.accept_compressed else (("grpc.compression_enabled_algorithms_bitset", 1),)
    return aio.server(
        interceptors=interceptors,
        options=[
            *compression,
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            # With it a second server could listen on the same port, and each would get some of the calls.
            ("grpc.so_reuseport", 0),
            # gRPC would otherwise let each stream send up to 16 MiB that the server has not asked for: measured, 64
            # streams that were no longer read from took up 1.2 GiB.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
            # gRPC refuses metadata between the two limits at random, and above the second always.
            ("grpc.max_metadata_size", settings.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
            ("grpc.max_concurrent_streams", settings.max_connection_calls),
            # Clients may ping an idle connection every 10 seconds to find out whether the server is alive.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Pings find clients that vanished without closing the connection; their texts and pairs are dropped.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ],
    )


async def start_engine(loaded: Loaded) -> None:
    """Start the engine and ask it a known answer: SERVING promises that the engine answers.

    Raises:
        UnsupportedModelError: The model gives a relevant and an irrelevant document the same score.
    """
    spec, engine = loaded.spec, loaded.engine
    log.info("loading", model=spec.name, kind=spec.kind, engine=engine.name)
    await engine.start()
    log.info("engine", engine=engine.name, dtype=engine.dtype, max_in_flight=engine.max_in_flight, **engine.choices())
    # A scorer without caches: a known score would not prove that the engine answers.
    scorer = Scorer(spec, loaded.layout, Scheduler(engine))
    try:
        answer = await known_answer.ask(scorer)
    finally:
        scorer.close()
    if not engine.versions:
        return  # no library computes: the engine of a test or a benchmark, without a model
    if answer.equal:
        raise UnsupportedModelError(
            f"{spec.name} gives a relevant and an irrelevant document the same score, {answer.relevant:g}: its head "
            "was lost when it was saved, or its output weights are missing; reranker-service check says more"
        )
    if answer.wrong:
        log.error(
            "the model ranks an irrelevant document first; is it a reranker?",
            query=known_answer.QUERY,
            relevant=round(answer.relevant, 4),
            irrelevant=round(answer.irrelevant, 4),
        )


async def open_servicer(settings: Settings, loaded: Loaded, servicer: RerankerServicer, metrics: Metrics) -> Scorer:
    """Open the servicer for calls, with a scorer over the started engine."""
    spec, engine = loaded.spec, loaded.engine
    facts = {"name": engine.name, "dtype": engine.dtype, "versions": engine.versions}
    identity = await asyncio.to_thread(fingerprint, spec, facts, engine.scoring_args)
    disk = None
    if settings.cache_dir is not None:
        disk = DiskCache(settings.cache_dir, settings.cache_dir_bytes, identity)
    scheduler = Scheduler(engine, metrics, settings.bulk_share)
    scorer = Scorer(spec, loaded.layout, scheduler, cache_bytes=settings.cache_bytes, disk=disk)
    metrics.watch(servicer.load)
    version = metadata.version("reranker-grpc")
    info = model_info(
        model=spec.name,
        kind=spec.kind,
        fingerprint=identity,
        ranges=scorer.ranges,
        limits=settings.limits,
        engine=engine.name,
        dtype=engine.dtype,
        versions={**engine.versions, "reranker-grpc": version},
        activation=spec.saved.activation,
        prompts=spec.saved.prompts,
        default_prompt_name=spec.saved.default_prompt_name,
        template=loaded.layout.template,
        pooling=spec.pooling,
        similarity=spec.saved.similarity,
        preferred_pairs_per_chunk=min(settings.preferred_chunk_pairs, settings.limits.max_pairs_per_chunk),
    )
    # The libraries' hundreds of thousands of objects live as long as the process. A full garbage collection that
    # looked through them would hold up all calls for half a second.
    gc.collect()
    gc.freeze()
    gc.enable()
    servicer.open(scorer, Validator(settings.limits, scorer.ranges), info)
    metrics.serving(
        {
            "model": spec.name,
            "kind": spec.kind,
            "engine": engine.name,
            "dtype": engine.dtype,
            "fingerprint": identity,
            "version": version,
        }
    )
    return scorer


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> asyncio.Task[T] | None:
    """Run ``work`` until it ends or ``stop`` is set. Returns the finished task, or ``None`` after a stop."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        working.result()
        return working
    working.cancel()
    await asyncio.wait({working})
    return None


async def _wait_dead(engine: Engine, metrics: Metrics) -> None:
    reason = await engine.wait_dead()
    metrics.engine_gone()
    log.error("engine died", reason=str(reason))


async def _set_health(checks: Health, status: int) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE):
        await checks.set(name, status)


def _bracketed(host: str) -> str:
    """Put an IPv6 address in brackets, as it needs them before a port."""
    return f"[{host}]" if ":" in host else host
