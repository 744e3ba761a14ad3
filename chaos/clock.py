"""Fault: a system clock that jumps, for servers and client alike, while the monotonic clock goes on.

The kernel's clock belongs to the whole machine and is left alone. A small library, loaded before the C library, shifts
the results of ``clock_gettime``, ``gettimeofday`` and ``time`` in the processes of the fork server, for Python and for
gRPC.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.ledger import Ledger
from chaos.run import Run, SkippedError
from examples.processes import Child
from tests.forked import ForkedProgram, ensure_fork_server

_SOURCE = Path(__file__).with_suffix(".c")
_JUMPS_SECONDS = (10.0, 60.0, 3600.0, 86_400.0, 365 * 86_400.0)
_random = random.SystemRandom()
_SEEN_SECONDS = 30.0
_END_SECONDS = 120.0
_shift: mmap.mmap | None = None


@contextmanager
def shifted_processes(directory: Path) -> Iterator[None]:
    """Start the fork server so that the clocks of its processes can be shifted, where a C compiler is installed.

    Args:
        directory: Directory for the library; it has to exist as long as processes are started.
    """
    global _shift
    compiler = shutil.which("cc")
    if compiler is None:
        yield
        return
    library, path = directory / "clock.so", directory / "clock"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
    path.write_bytes(bytes(8))
    with path.open("r+b") as file:
        _shift = mmap.mmap(file.fileno(), 8)
    shifted = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(path)}
    os.environ.update(shifted)
    try:
        ensure_fork_server()
    finally:
        for name in shifted:
            del os.environ[name]
    try:
        yield
    finally:
        _shift = None


def jumping_clock(run: Run) -> None:
    """Set the clock of two servers and of a client to another time, in both directions, by up to a year."""
    shift = _shift
    if shift is None:
        raise SkippedError("it needs a C compiler, cc, to shift the clock of a process")
    with run.serving(2) as servers:
        addresses = [server.address for server in servers]
        client = _Client(json.dumps({"addresses": addresses, "side": run.sizes.side}))
        try:
            client.wait_for("jumps=0")
            for number in run.injections:
                size = _random.choice(_JUMPS_SECONDS) * _random.uniform(0.2, 1.0) * _random.choice((-1, 1))
                shift[:] = round(size * 1e9).to_bytes(8, sys.byteorder, signed=True)
                client.wait_for(rf"jumps={number + 1}$", _SEEN_SECONDS)
                run.pause(0.5, 1.5)
            client.signal(signal.SIGTERM)
            counts = json.loads(client.wait_for(r"ledger=(.*)", _END_SECONDS)[1])
        finally:
            shift[:] = bytes(8)
            client.stop()
    run.ledger = Ledger.of(counts)


class _Client(Child):
    """``python -m chaos.client``, forked.

    Args:
        task: Its task; see there.
    """

    popen = staticmethod(ForkedProgram)  # type: ignore[assignment]

    def __init__(self, task: str) -> None:
        environment = {"PYTHONUNBUFFERED": "1"}
        super().__init__([sys.executable, "-m", "chaos.client", task], environment=environment, name="The client")
