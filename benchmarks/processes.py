"""Sides in processes of their own: started, watched through their log, held still while another side runs, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_TAIL_LINES = 30
_STOP_SECONDS = 40.0
_START_SECONDS = 240.0


class ProcessError(RuntimeError):
    """A process ended, or did not say in time what was waited for; the message ends with its last log lines."""


class Child:
    """A process with everything it starts, as one group.

    Args:
        command: Program and arguments.
        log_path: Where its output goes.
        environment: Variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> None:
        # A session of its own: the group can be held still, and Ctrl-C reaches this program alone.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **environment},
        )
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

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self._process.send_signal(number)

    def lines(self) -> int:
        """How many lines its log has."""
        with self._changed:
            return len(self._lines)

    def wait_for(self, pattern: str, seconds: float = _START_SECONDS, after: int = 0) -> re.Match[str]:
        """Wait for a log line, from line ``after`` on, in which ``pattern`` is found; gives the match.

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
                    what = "ended" if self._ended else f"took more than {seconds:.0f} s"
                    tail = "\n".join(self._lines[-_TAIL_LINES:])
                    raise ProcessError(f"A process {what} without {pattern!r} in its log, {self._log_path}:\n{tail}")
                self._changed.wait(left)

    def pause(self) -> None:
        """Hold the whole group still: even an idle engine takes a share of a core."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the group run on."""
        os.killpg(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it in order, and what is left of its group by force."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._reader.join(_STOP_SECONDS)
            return
        self._reader.join(_STOP_SECONDS)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log_path.open("w", encoding="utf-8") as log:
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
    process = Child(command, log_path, environment or {})
    try:
        yield process
    finally:
        process.stop()
