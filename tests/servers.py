"""Servers for tests: the real program in a process of its own, and the real servicer around a controlled engine."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np
from grpc import aio
from numpy.typing import NDArray

from examples.processes import Child
from examples.serving import server_command
from reranker.v1 import reranker_pb2 as pb
from reranker_service.engines import EngineDeadError, TokenSequence
from reranker_service.models import make_layout, read_model
from reranker_service.rpc.admission import Admission
from reranker_service.rpc.limits import Limits
from reranker_service.rpc.servicer import RerankerServicer
from reranker_service.rpc.validation import Validator
from reranker_service.scheduling import Scheduler
from reranker_service.scoring import Scorer

from .forked import ForkedProgram


class ServerProcess(Child):
    """``python -m reranker_service`` with given flags on a free loopback port; ended with the ``with`` block.

    Args:
        flags: The flags.
        ready: Whether to wait until it answers.
        module: One that runs the server around another engine.
        fresh: Whether it runs in a fresh interpreter; otherwise it is forked with its libraries imported.
        environment: More variables.

    Attributes:
        address: ``HOST:PORT``, once it answers.
    """

    def __init__(
        self,
        *flags: str,
        ready: bool = True,
        module: str = "reranker_service",
        fresh: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.popen = subprocess.Popen if fresh else ForkedProgram
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
        super().__init__(server_command(*flags, module=module), environment=environment, name="The server")
        if ready:
            try:
                self.address = self.wait_ready()
            except BaseException:
                self.stop()
                raise

    def line(self, text: str) -> str:
        """The first log line that holds ``text``, once there is one. Raises ``ProcessError`` if the server ends."""
        return self.wait_for(re.escape(text)).string

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ControlledEngine:
    """An engine whose scores are the lengths of its sequences; it answers only while its gate is open."""

    name = "torch"
    dtype = "float32"
    batch_tokens: int | None = None
    overtakes = False
    step_tokens: int | None = None
    versions: dict[str, str]

    def __init__(self, *, max_in_flight: int = 64, max_batch: int = 16, open_gate: bool = True) -> None:
        self.max_in_flight = max_in_flight
        self.max_batch = max_batch
        self.versions = {}
        self.scoring_args: dict[str, object] = {}
        self.gate = asyncio.Event()
        if open_gate:
            self.gate.set()
        self.batches: list[list[TokenSequence]] = []
        self.urgent: list[bool] = []  # of each batch
        self.cancelled = 0
        self.arrived = asyncio.Condition()
        self.failure: Exception | None = None

    async def start(self) -> None:
        return None

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        self.batches.append(list(sequences))
        self.urgent.append(urgent)
        async with self.arrived:
            self.arrived.notify_all()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += len(sequences)
            raise
        if self.failure is not None:
            raise self.failure
        return np.array([len(sequence.ids) for sequence in sequences], dtype=np.float32)

    async def wait_for_sequences(self, count: int) -> None:
        """Return once ``count`` sequences have been given to the engine."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: sum(map(len, self.batches)) >= count)

    async def wait_dead(self) -> EngineDeadError:
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        return None


@contextlib.asynccontextmanager
async def serve_in_process(
    model: Path,
    engine: ControlledEngine,
    limits: Limits | None = None,
    *,
    cache_bytes: int = 0,
    admission: Admission | None = None,
) -> AsyncIterator[aio.Channel]:
    """Serve ``engine`` with the real servicer, scorer and layout over a real socket; gives a channel to it."""
    spec = read_model(str(model))
    limits = limits or Limits()
    scorer = Scorer(spec, make_layout(spec), Scheduler(engine), cache_bytes=cache_bytes)
    servicer = RerankerServicer(admission=admission)
    servicer.open(scorer, Validator(limits, scorer.ranges), pb.GetModelInfoResponse(model=spec.name, fingerprint="f"))
    server = aio.server()
    server.add_generic_rpc_handlers((servicer.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
        scorer.close()


def violations(error: grpc.RpcError) -> dict[str, str]:
    """Field to description, from the rich details of a failed call."""
    from grpc_status import rpc_status

    status = rpc_status.from_call(error)
    assert status is not None, error
    return violations_of(status)


def violations_of(status: object) -> dict[str, str]:
    """Field to description, from a status."""
    from google.rpc import error_details_pb2

    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    return {one.field: one.description for one in detail.field_violations}
