"""Reranker server in a child process, started and ended by a ``with`` block."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_READY = re.compile(r"\bevent=ready\b.*\baddress=(\S+)")
_TAIL_LINES = 25


class ServerStartError(RuntimeError):
    """The server ended, or was not ready in time; the message ends with the last lines of its log."""


class Server:
    """A running server.

    Attributes:
        address: ``HOST:PORT``.
    """

    def __init__(self, command: Sequence[str], log_path: Path, start_seconds: float) -> None:
        # A session of its own: Ctrl-C reaches this program alone, which then ends the server in order.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.address = ""
        self._log_path = log_path
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._decided = threading.Event()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._copy_log, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        self._start_seconds = start_seconds

    def wait_ready(self) -> str:
        """Wait for the log line that says that the server can answer.

        Returns:
            The address.

        Raises:
            ServerStartError: The server ended instead, or took longer than the time limit.
        """
        in_time = self._decided.wait(self._start_seconds)
        if self.address:
            return self.address
        what = "ended before it was ready" if in_time else f"was not ready within {self._start_seconds:.0f} s"
        raise ServerStartError(
            f"The reranker server {what}. The end of its log ({self._log_path}):\n" + "\n".join(self._tail)
        )

    def stop(self, seconds: float = 60.0) -> None:
        """Ask the server to end, wait for it, and after ``seconds`` end it and what it started by force."""
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(seconds)

    def _copy_log(self, lines: IO[str]) -> None:
        with self._log_path.open("w", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self._tail.append(line.rstrip("\n"))
                if not self.address and (ready := _READY.search(line)):
                    self.address = ready[1]
                    self._decided.set()
        self._decided.set()


@contextmanager
def reranker_server(
    log_path: Path, engine: str = "auto", flags: Sequence[str] = (), start_seconds: float = 300.0
) -> Iterator[Server]:
    """Start ``python -m reranker_service`` on a free loopback port, and end it with the block.

    The block begins at once, while the server still loads; ``Server.wait_ready`` gives the address.

    Args:
        log_path: Where the server's log goes; the directory must exist.
        engine: ``"auto"``, ``"vllm"`` or ``"torch"``.
        flags: More flags of the server, such as ``["--model", "path/to/model"]``.
        start_seconds: How long it may take until the server is ready.
    """
    command = [sys.executable, "-m", "reranker_service", "--host", "127.0.0.1", "--port", "0", "--engine", engine]
    server = Server([*command, "--log-format", "logfmt", *flags], log_path, start_seconds)
    try:
        yield server
    finally:
        server.stop()
