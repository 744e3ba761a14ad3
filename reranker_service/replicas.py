"""Replicas: starts several servers on one machine, each pinned to its device, and starts a dead one again.

The supervisor holds no port, and no request passes through it. A server tells it over a socket (systemd's protocol)
that it answers. While servers start for the first time, one that ends stops all: the model or a flag is wrong. Later, a
server that ends is started again after a backoff, and the others go on. SIGTERM and SIGINT are passed on to all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from . import devices
from .observing.logs import REPLICA_VARIABLE
from .observing.notify import ADDRESS, notify_ready
from .settings import Settings

FIRST_BACKOFF_SECONDS = 1.0
"""Longest time until a dead server is started again; twice as long after each further death."""
_LONGEST_BACKOFF_SECONDS = 60.0
# A server that answered for so long before it died begins with the first backoff again.
_STEADY_SECONDS = 60.0
# Time beside --graceful-timeout after which a server that does not end is killed.
_END_SECONDS = 30.0
_SETTINGS_STATUS = 2

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Plan:
    """Command of one server, and the devices it gets.

    Attributes:
        number: Its number, from 0.
        flags: Its flags.
        environment: Its variables beside those of the supervisor.
        cores: CPU cores that it may use; empty: all.
    """

    number: int
    flags: tuple[str, ...]
    environment: dict[str, str]
    cores: frozenset[int] = frozenset()


# Each server gets the next port of each; 0 and None stay.
_PORTS = ("port", "metrics_port", "health_port")


class Process(Protocol):
    """The part of ``subprocess.Popen`` that the supervisor uses."""

    pid: int

    def wait(self) -> int:
        """See ``subprocess.Popen``."""

    def send_signal(self, number: int) -> None:
        """See ``subprocess.Popen``."""


Launch = Callable[[Sequence[str], Mapping[str, str]], Process]
"""Starts a process from a command and all its variables."""


def plans(settings: Settings, environment: Mapping[str, str], cores: Sequence[int]) -> list[Plan]:
    """Share out devices and ports to the servers of ``--replicas``.

    Each server gets as many GPUs as vLLM shares its model out to (one otherwise), or a part of the cores where there is
    no GPU, or with ``--device cpu``.

    Args:
        settings: The settings.
        environment: The variables of this process.
        cores: CPU cores of this process.

    Raises:
        devices.DeviceError: There are too few GPUs, or ``--device`` names one.
        ValueError: There are too few ports.
    """
    gpus = devices.visible_gpus(environment)
    if settings.device not in ("auto", "cpu", "cuda"):
        raise devices.DeviceError(
            f"--device {settings.device} with --replicas: each server gets a GPU of its own; list the GPUs to use in "
            f"{devices.VISIBLE}"
        )
    if settings.device == "cpu":
        gpus = []
    elif settings.device == "cuda" and not gpus:
        raise devices.DeviceError(f"--device cuda: no GPU is visible (see nvidia-smi and {devices.VISIBLE})")
    each = devices.gpus_of_one_server(settings.engine_args) if gpus else 1
    count = max(len(gpus) // each, 1) if settings.replicas == "auto" else settings.replicas
    if gpus and count * each > len(gpus):
        raise devices.DeviceError(
            f"--replicas {settings.replicas}: {count} x {each} GPUs are needed, and {len(gpus)} are visible; start "
            "fewer servers, or share a model out to fewer GPUs"
        )
    for name in _PORTS:
        first = getattr(settings, name)
        if first and first + count > 65536:
            raise ValueError(f"--{name.replace('_', '-')} {first} leaves no room for {count} ports; the last is 65535")
    return [_plan(settings, number, count, gpus, each, cores) for number in range(count)]


def _plan(settings: Settings, number: int, count: int, gpus: Sequence[str], each: int, cores: Sequence[int]) -> Plan:
    ports = {name: port + number for name in _PORTS if (port := getattr(settings, name))}
    own = settings.model_copy(update={"replicas": 1, **ports})
    environment = {REPLICA_VARIABLE: str(number)}
    if gpus:
        environment[devices.VISIBLE] = ",".join(gpus[number * each : (number + 1) * each])
        return Plan(number, tuple(flags_of(own)), environment)
    if count > len(cores):
        mine = [cores[number % len(cores)]]
    else:
        mine = list(cores[number * len(cores) // count : (number + 1) * len(cores) // count])
    environment["OMP_NUM_THREADS"] = str(len(mine))
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, mine))
    return Plan(number, tuple(flags_of(own)), environment, frozenset(mine))


def flags_of(settings: Settings) -> Iterator[str]:
    """Write the settings that are set as flags of ``reranker-service``; reading them gives equal settings."""
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        if name == "limits":
            for limit in sorted(value.model_fields_set):
                yield from (f"--limits.{limit.replace('_', '-')}", str(getattr(value, limit)))
        elif isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{name.replace('_', '-')}"
        elif value is not None:
            written = json.dumps(value) if isinstance(value, dict) else str(value)
            yield f"--{name.replace('_', '-')}={written}"


def own_module() -> str:
    """Return the module that this process runs: a program around the server has its servers run it too."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "reranker_service" if spec is None else str(spec.name).removesuffix(".__main__")


def popen(command: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Start a process."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


class Supervisor:
    """The servers of one machine.

    Args:
        plans: The servers.
        grace: Seconds that calls in flight may take to finish at the end.
        module: Module that each server runs.
        launch: Starts a process.
        first_backoff: Longest time until a dead server is started again for the first time, in seconds.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        grace: float,
        module: str = "reranker_service",
        launch: Launch = popen,
        first_backoff: float = FIRST_BACKOFF_SECONDS,
    ) -> None:
        self._plans = plans
        self._grace = grace
        self._module = module
        self._launch = launch
        self._first_backoff = first_backoff
        self._addresses: dict[int, str] = {}
        self._processes: dict[int, Process] = {}
        self._stopping = asyncio.Event()
        self._begun = False  # whether all servers have answered once
        self._status = 0
        # A thread waits for each process: the default executor of a small machine has fewer threads than servers.
        self._threads = ThreadPoolExecutor(len(plans), thread_name_prefix="replica")

    def stop(self) -> None:
        """End all servers in order; ``run`` then returns."""
        self._stopping.set()
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)

    async def run(self) -> int:
        """Run the servers until ``stop`` is called or one of them cannot start.

        Returns:
            The exit status: 0 after ``stop`` if every server ended with 0.
        """
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="reranker-") as directory:
            tasks = [asyncio.create_task(self._keep(plan, Path(directory), began)) for plan in self._plans]
            try:
                await asyncio.gather(*tasks)
            finally:
                self.stop()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._threads.shutdown()
        log.info("stopped", status=self._status)
        return self._status

    async def _keep(self, plan: Plan, directory: Path, began: float) -> None:
        """Run one server, and start it again whenever it ends."""
        deaths = 0
        while not self._stopping.is_set():
            started, ready = time.monotonic(), False

            def on_ready(address: str) -> None:
                nonlocal ready
                ready = True
                self._ready(plan, address, began)

            status = await self._run_once(plan, directory / f"{plan.number}-{deaths}", on_ready)
            if self._stopping.is_set():
                self._status = max(self._status, _as_exit_status(status))
                return
            known = plan.number in self._addresses
            log.error("server ended", replica=plan.number, status=status)
            if not known:
                log.error("cannot start: a server ended before it answered for the first time", replica=plan.number)
                self._status = _as_exit_status(status) or 1
                self.stop()
                return
            deaths = 1 if ready and time.monotonic() - started >= _STEADY_SECONDS else deaths + 1
            longest = min(self._first_backoff * 2 ** min(deaths - 1, 16), _LONGEST_BACKOFF_SECONDS)
            seconds = longest * random.SystemRandom().uniform(0.5, 1)
            log.info("restarting", replica=plan.number, seconds=round(seconds, 1))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()

    async def _run_once(self, plan: Plan, path: Path, on_ready: Callable[[str], None]) -> int:
        """Run a process of one server to its end; returns its exit status.

        Args:
            plan: The server.
            path: For the socket over which it says that it is ready.
            on_ready: Called with its address.
        """
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind(str(path))
            notices.setblocking(False)

            def read() -> None:
                for line in notices.recv(4096).decode(errors="replace").splitlines():
                    if line.startswith(ADDRESS):
                        on_ready(line.removeprefix(ADDRESS))

            loop.add_reader(notices, read)
            try:
                process = self._start(plan, path)
                return await self._wait(process)
            finally:
                self._processes.pop(plan.number, None)
                loop.remove_reader(notices)

    def _start(self, plan: Plan, path: Path) -> Process:
        command = [sys.executable, "-m", f"{__package__}.replica", str(os.getpid()), self._module, *plan.flags]
        # Flags say all; a variable of a setting would count where a flag is missing.
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("RERANKER_")}
        environment = {**plan.environment, **inherited, "NOTIFY_SOCKET": str(path)}
        environment |= {name: plan.environment[name] for name in _OWN & plan.environment.keys()}
        with _on_cores(plan.cores):
            process = self._launch(command, environment)
        self._processes[plan.number] = process
        log.info("server started", replica=plan.number, pid=process.pid)
        return process

    async def _wait(self, process: Process) -> int:
        ended = asyncio.get_running_loop().run_in_executor(self._threads, process.wait)
        stopping = asyncio.create_task(self._stopping.wait())
        both: set[asyncio.Future[Any]] = {ended, stopping}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not ended.done():
            await asyncio.wait({ended}, timeout=self._grace + _END_SECONDS)
            if not ended.done():
                log.error("a server did not end; killing it", pid=process.pid)
                process.send_signal(signal.SIGKILL)
        return await ended

    def _ready(self, plan: Plan, address: str, began: float) -> None:
        self._addresses[plan.number] = address
        if self._begun:
            log.info("server ready again", replica=plan.number, address=address)
        elif len(self._addresses) == len(self._plans):
            self._begun = True
            addresses = ",".join(self._addresses[one.number] for one in self._plans)
            log.info("ready", addresses=addresses, seconds=round(time.monotonic() - began, 1))
            notify_ready(addresses)


# Variables of a plan that override those of the supervisor's environment.
_OWN = frozenset({REPLICA_VARIABLE, devices.VISIBLE})


def _as_exit_status(status: int) -> int:
    """Return an exit status for a process that a signal may have ended."""
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Bind this thread to cores, which a process that it starts inherits."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _own_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


async def supervise(settings: Settings) -> int:
    """Run the servers of ``--replicas`` until SIGTERM or SIGINT; returns the exit status."""
    try:
        planned = plans(settings, os.environ, _own_cores())
    except ValueError as error:
        log.error("cannot start", reason=str(error))
        return _SETTINGS_STATUS
    supervisor = Supervisor(planned, settings.graceful_timeout, own_module())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
    return await supervisor.run()
