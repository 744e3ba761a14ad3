"""Python programs in processes that are forked from one process with the large libraries imported.

To import torch, transformers and sentence-transformers takes ten seconds of CPU time. Each test worker imports them a
second time, in the fork server of ``multiprocessing``; a program that is forked from it starts in milliseconds. From
its first line on it is the program that a fresh interpreter would run: own process, arguments, environment, files,
signals, exit status. Tests of what happens before or during the imports take a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

# An exit status is one message, which can be read once. Two threads that read at the same time would leave one of them
# without it, and multiprocessing reads the status of every process whenever it starts one.
_reading_status = threading.Lock()


def ensure_fork_server() -> None:
    """Start the fork server, if it is not running yet.

    A process has only one fork server. Tests that start vLLM in the tests' own process call this first: the engine
    would otherwise start a fork server whose processes block SIGINT.
    """
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    forkserver.ensure_running()


class ForkedProgram:
    """Replacement of ``subprocess.Popen`` for ``[sys.executable, "-m", ...]`` and ``[sys.executable, "-c", ...]``.

    Attributes:
        stdout: Output of the program, as text; set with ``stdout=subprocess.PIPE``.
        stderr: Its standard error, likewise.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = True,
        errors: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        process_group: int | None = None,
    ) -> None:
        assert command[0] == sys.executable, command
        assert stdin == subprocess.DEVNULL
        assert text
        ensure_fork_server()
        self.args = command
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        with contextlib.ExitStack() as ours:
            files: list[int] = []
            for number, asked in ((0, stdin), (1, stdout), (2, stderr)):
                if asked == subprocess.PIPE:
                    reading, writing = os.pipe()
                    ours.callback(os.close, writing)
                    stream = open(reading, errors=errors)  # noqa: SIM115 - it is the caller's
                    self.stdout, self.stderr = (stream, self.stderr) if number == 1 else (self.stdout, stream)
                    files.append(writing)
                elif asked == subprocess.DEVNULL:
                    files.append(os.open(os.devnull, os.O_RDWR))
                    ours.callback(os.close, files[-1])
                elif asked == subprocess.STDOUT:
                    files.append(files[1])
                else:
                    files.append(number if asked is None else asked)
            ready, begins = os.pipe()
            ours.callback(os.close, ready)
            self._process = multiprocessing.get_context("forkserver").Process(
                target=_Start(command[1:], [*files, begins], cwd or Path.cwd(), env, start_new_session, process_group)
            )
            with _reading_status:
                self._process.start()
            # As with Popen, the process is of its session and has its files before the constructor returns.
            os.close(begins)
            os.read(ready, 1)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or the negative number of the signal that ended the program; ``None`` while it runs."""
        with _reading_status:
            return self._process.exitcode

    def poll(self) -> int | None:
        """The same as ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the program's end; gives ``returncode``. Raises ``subprocess.TimeoutExpired``."""
        connection.wait([self._process.sentinel], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to a program that still runs."""
        with contextlib.suppress(ProcessLookupError):  # it may end at this moment
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Start:
    """Start of a program in the forked process; it gets there by pickle."""

    def __init__(
        self,
        arguments: Sequence[str],
        files: Sequence[int],
        cwd: Path,
        env: Mapping[str, str] | None,
        session: bool,
        group: int | None,
    ) -> None:
        self._arguments = list(arguments)
        self._files: Sequence[int | Any] = files
        self._cwd = cwd
        self._env = dict(os.environ if env is None else env)
        self._session, self._group = session, group

    def __getstate__(self) -> dict[str, Any]:
        # Called while the process starts, which is when open files can be handed to it.
        return {**self.__dict__, "_files": [DupFd(file) for file in self._files]}

    def __call__(self) -> None:
        *files, begins = (file.detach() for file in self._files)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        if self._session:
            os.setsid()
        elif self._group is not None:
            os.setpgid(0, self._group)
        os.close(begins)
        os.environ.clear()
        os.environ.update(self._env)
        os.chdir(self._cwd)
        if self._env.get("PYTHONUNBUFFERED"):
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        kind, program, *arguments = self._arguments
        if kind == "-m":
            sys.argv = [program, *arguments]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            assert kind == "-c", self._arguments
            sys.argv = ["-c", *arguments]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(program, main.__dict__)


def run(
    command: Sequence[str], *, timeout: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as ``subprocess.run`` does, with its output captured.

    Raises:
        subprocess.TimeoutExpired: It took longer than ``timeout`` seconds, and was killed with its group.
    """
    with contextlib.ExitStack() as files:
        written = [files.enter_context(open(os.memfd_create("output"), "w+")) for _ in range(2)]
        outputs = [file.fileno() for file in written]
        program = ForkedProgram(command, stdout=outputs[0], stderr=outputs[1], cwd=cwd, env=env, start_new_session=True)
        try:
            status = program.wait(timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, 9)
            raise
        for file in written:
            file.seek(0)
        return subprocess.CompletedProcess(command, status, *(file.read() for file in written))
