"""Launcher: starts servers and workers with the same model, number format and cores for all compared sides."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil  # type: ignore[import-untyped]
import torch

from examples.processes import Child, ProcessError, child
from examples.serving import server_command


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that all sides run on.

    Attributes:
        cuda: Whether there is a GPU.
        dtype: Number format of every side.
        cores: CPU cores that vLLM's threads are bound to.
    """

    cuda: bool
    dtype: str
    cores: tuple[int, ...]

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        cuda = torch.cuda.is_available()
        return cls(cuda, "bfloat16" if cuda else "float32", tuple(sorted(os.sched_getaffinity(0))))

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process."""
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.cuda or len(self.cores) > 4:
            return quiet
        # Both sides of a comparison get every core; vLLM's default keeps one back.
        return {**quiet, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores))}

    @property
    def engine_args(self) -> dict[str, object]:
        """Arguments of every vLLM engine: several of them are loaded at a time."""
        return {"gpu_memory_utilization": 0.2} if self.cuda else {}


class Launcher:
    """Starts the processes.

    Args:
        machine: What they run on.
        logs: Directory for their logs.
    """

    def __init__(self, machine: Machine, logs: Path) -> None:
        self.machine = machine
        self._logs = logs
        self._count = 0

    def server(
        self,
        model: Path,
        engine: str,
        flags: Sequence[str] = (),
        module: str = "reranker_service",
        **engine_args: object,
    ) -> AbstractContextManager[Child]:
        """Our server, its score cache off; ``module`` may be one that wraps it."""
        arguments = json.dumps({**(self.machine.engine_args if engine == "vllm" else {}), **engine_args})
        own = ("--model", str(model), "--engine", engine, "--dtype", self.machine.dtype, "--engine-args", arguments)
        return self._start(server_command(*own, "--cache-bytes", "0", *flags, module=module))

    def bare(self, model: Path, side: str) -> AbstractContextManager[Child]:
        """A worker of ``benchmarks.bare``: ``side`` is "torch", "vllm" or "predict"."""
        arguments = json.dumps(self.machine.engine_args)
        own = ("--model", str(model), "--side", side, "--dtype", self.machine.dtype, "--engine-args", arguments)
        return self._start([sys.executable, "-m", "benchmarks.bare", *own])

    def baseline(self, model: Path) -> AbstractContextManager[Child]:
        """The plain HTTP service of ``benchmarks.baseline``."""
        return self._start([sys.executable, "-m", "benchmarks.baseline", "--model", str(model)])

    def replies(self) -> AbstractContextManager[Child]:
        """A server of ``benchmarks.loss_replies``, which answers at once and has no model."""
        return self._start([sys.executable, "-m", "benchmarks.loss_replies"])

    def rank(self, job: Path, variables: Mapping[str, str]) -> AbstractContextManager[Child]:
        """One rank of ``benchmarks.loss_ranks``; ``variables`` are those of PyTorch's distributed package."""
        return self._start([sys.executable, "-m", "benchmarks.loss_ranks", str(job)], variables)

    def vllm_http(self, model: Path) -> AbstractContextManager[Child]:
        """Start vLLM's HTTP server with the settings that our vLLM engine passes to vLLM."""
        flags = ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]
        if self.machine.cuda:
            flags = ["--gpu-memory-utilization", str(self.machine.engine_args["gpu_memory_utilization"])]
        return self._start(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(model), "--served-model-name", "model", "--runner", "pooling"),
                *("--dtype", self.machine.dtype, "--host", "127.0.0.1", "--port", "0"),
                *("--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log", *flags),
            ]
        )

    def _start(
        self, command: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})
    ) -> AbstractContextManager[Child]:
        self._count += 1
        module = command[2].rpartition(".")[2]
        environment = {**self.machine.environment, **variables}
        return child(command, self._logs / f"{self._count:02d}-{module}.log", environment)


def address_of(process: Child) -> str:
    """``HOST:PORT`` of a process of ours, once it is ready. Raises ``ProcessError``."""
    return process.wait_ready()


def http_address_of(process: Child) -> str:
    """Wait until vLLM's HTTP server is ready and return its ``HOST:PORT``.

    vLLM does not log the port that it chose, so the port is read from the operating system's list of sockets.

    Raises:
        ProcessError: The server ended, or does not listen on any port.
    """
    process.wait_for("Application startup complete")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for connection in psutil.Process(process.pid).net_connections("tcp4"):
            if connection.status == psutil.CONN_LISTEN:
                return f"{connection.laddr.ip}:{connection.laddr.port}"
    raise ProcessError("vLLM's HTTP server reported that it had started, but listens on no port")
