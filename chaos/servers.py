"""Server of a chaos run: a real server process that is killed, paused and restarted on the same port."""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil  # type: ignore[import-untyped]

from chaos.served import COUNT_BYTES
from tests.servers import ServerProcess

START_SECONDS = 180.0
_END_SECONDS = 60.0
_numbers = itertools.count()


class Server:
    """A server with an address of its own, which survives its processes.

    Args:
        model: Directory of the model.
        directory: Directory for the file of pairs scored.
        rate: Pairs that its engine scores in a second.
        seed: Its model.
        flags: More flags.

    Attributes:
        address: ``HOST:PORT``.
        seed: Its model; what is set here counts from the next start on.
    """

    def __init__(
        self, model: Path, directory: Path, rate: float, *, seed: int = 0, flags: tuple[str, ...] = ()
    ) -> None:
        self.seed = seed
        self._model, self._rate, self._flags = model, rate, flags
        self._scored = directory / f"scored-{next(_numbers)}"
        self._scored.touch()
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._process: ServerProcess | None = None

    @property
    def scored(self) -> int:
        """Pairs that the engine was given, of all processes so far."""
        return int(np.fromfile(self._scored, dtype=f"<u{COUNT_BYTES}").sum())

    @property
    def process(self) -> ServerProcess:
        """The running process."""
        assert self._process is not None, "the server is not running"
        return self._process

    def start(self) -> None:
        """Start a process; ``wait_ready`` waits until it answers."""
        assert self._process is None, "the server is running"
        self._process = self._launch("--port", str(self._port), *self._flags)

    def _launch(self, *flags: str) -> ServerProcess:
        own = {"seed": self.seed, "rate": self._rate, "scored": str(self._scored)}
        flags = ("--model", str(self._model), "--engine", "torch", "--engine-args", json.dumps(own), *flags)
        return ServerProcess(*flags, ready=False, module="chaos.served")

    def wait_ready(self) -> None:
        """Wait until the process answers. Raises ``ProcessError``."""
        self.process.wait_ready(START_SECONDS)

    def end(self, number: signal.Signals) -> int:
        """End the process with a signal; returns its exit status, negative for a signal that was not handled."""
        self.process.signal(number)
        return self.wait_end()

    def wait_end(self) -> int:
        """Wait until the process has ended; returns its exit status."""
        process, self._process = self.process, None
        try:
            return process.wait(_END_SECONDS)
        finally:
            process.stop()

    def restart(self, number: signal.Signals) -> int:
        """End the process with a signal, start another, and wait until it answers; returns the exit status."""
        status = self.end(number)
        self.start()
        self.wait_ready()
        return status

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()


class VllmServer(Server):
    """A server with vLLM in place of the engine of fixed speed; its pairs are not counted.

    Args:
        model: Directory of a cross-encoder.
        directory: See the base class.
        flags: More flags.
    """

    def __init__(self, model: Path, directory: Path, *flags: str) -> None:
        super().__init__(model, directory, rate=0.0, flags=flags)

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes in which vLLM computes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "EngineCore" in " ".join(child.cmdline())]

    def _launch(self, *flags: str) -> ServerProcess:
        flags = ("--model", str(self._model), "--engine", "vllm", "--dtype", "float32", *flags)
        return ServerProcess(*flags, ready=False, fresh=True)


def free_port() -> int:
    """Find a free port below those that the system gives to outgoing connections.

    A server that is down could otherwise lose its port to a client that tries to reach it.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
