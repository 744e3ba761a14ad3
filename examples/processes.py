"""Child: a process group that is started, watched through its log, paused while another one runs, and ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_READY = r"\bevent=ready\b.*\baddress=(\S+)"
_TAIL_LINES = 30
_STOP_SECONDS = 60.0
_START_SECONDS = 300.0


class ProcessError(RuntimeError):
    """A process ended, or its log lacked an expected line after a time limit; the message ends with the last lines."""


class Child:
    """A process with everything it starts, as one group.

    Args:
        command: Program and arguments.
        log_path: Where its output goes, beside ``lines``; the directory must exist.
        environment: Variables beside those of this process.
        name: The process in error messages.
    """

    popen = subprocess.Popen
    """Starts the process."""

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        name: str = "A process",
    ) -> None:
        # A session of its own: the group can be paused, and Ctrl-C reaches this program alone, which then ends the
        # process in order.
        self._process = self.popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self._name = name
        self._log_path = log_path
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process that was started; its children are of its group."""
        return self._process.pid

    @property
    def lines(self) -> list[str]:
        """The lines of its log so far."""
        with self._changed:
            return self._lines.copy()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self._process.send_signal(number)

    def wait_for(
        self, pattern: str, seconds: float = _START_SECONDS, after: int = 0, goal: str | None = None
    ) -> re.Match[str]:
        """Wait for a log line, from line ``after`` on, in which ``pattern`` is found; gives the match.

        Args:
            pattern: A regular expression.
            seconds: Time limit.
            after: How many lines to pass over.
            goal: The line's meaning, for the error message.

        Raises:
            ProcessError: The process ended without such a line, or ``seconds`` have passed.
        """
        expression, position, deadline = re.compile(pattern), after, time.monotonic() + seconds
        with self._changed:
            while True:
                while position < len(self._lines):
                    if found := expression.search(self._lines[position]):
                        return found
                    position += 1
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    break
                self._changed.wait(left)
            goal = goal or f"{pattern!r} was in its log"
            fault = f"ended before {goal}" if self._ended else f"took more than {seconds:.0f} s until {goal}"
            log = f" ({self._log_path})" if self._log_path else ""
            tail = "\n".join(self._lines[-_TAIL_LINES:])
        raise ProcessError(f"{self._name} {fault}. The end of its log{log}:\n{tail}")

    def wait_ready(self, seconds: float = _START_SECONDS) -> str:
        """Wait for the line with which a server says that it can answer; gives its ``HOST:PORT``.

        Raises:
            ProcessError: The server ended without that line, or ``seconds`` have passed.
        """
        return self.wait_for(_READY, seconds, goal="it was ready")[1]

    def pause(self) -> None:
        """Stop the whole group with SIGSTOP: even an idle engine takes a share of a core."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the group run on."""
        os.killpg(self.pid, signal.SIGCONT)

    def wait(self, seconds: float = _START_SECONDS) -> int:
        """Wait for the end of the process; gives its exit status. Raises ``subprocess.TimeoutExpired``."""
        return self._process.wait(seconds)

    def stop(self) -> None:
        """End the process in order, and the rest of its group by force."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # it may end at this moment
                self.resume()
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._reader.join(_STOP_SECONDS)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with (self._log_path or Path(os.devnull)).open("w", encoding="utf-8") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@contextmanager
def child(command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None) -> Iterator[Child]:
    """A process for as long as the block lasts."""
    process = Child(command, log_path, environment)
    try:
        yield process
    finally:
        process.stop()
