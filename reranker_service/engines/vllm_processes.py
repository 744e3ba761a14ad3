"""Processes of vLLM: its engine core is forked from a process that imports vLLM while this process does.

vLLM starts its engine core as a new interpreter, which begins to import vLLM (14 seconds of CPU on slow cores) after
this process has done so. The fork server of ``multiprocessing`` is an interpreter without gRPC's listening socket and
without threads. vLLM uses one in its own API server only, so ``fork_engine_core`` replaces a function of vLLM; a
version of vLLM without this function starts a new interpreter. Workers are new interpreters in any case: on a CPU, vLLM
gives them variables that libraries read when they are loaded (``LD_PRELOAD``, ``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess

from ..observing.logs import output_of_children


class EngineCoreProcess(ForkServerProcess):
    """A process that has the environment of its parent and ends when its parent ends, even if that is killed."""

    def start(self) -> None:
        """See ``multiprocessing.Process.start``."""
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        """See ``multiprocessing.Process.run``."""
        # vLLM hands settings to its workers in the environment; the fork server has the environment from before them.
        # Equal variables are left alone: setproctitle can't name a process whose variables have all moved in memory.
        os.environ.update(self._environment.items() - os.environ.items())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class EngineCoreContext(ForkServerContext):
    """A context of ``multiprocessing`` that makes ``EngineCoreProcess``."""

    Process = EngineCoreProcess


def start_importing() -> None:
    """Start the fork server, if it is not running yet. The fork server imports vLLM; this call returns at once."""
    _set_environment()
    # Ctrl-C at a terminal reaches the whole process group, and vLLM's processes must outlive the calls in flight:
    # they inherit a blocked SIGINT, and VllmEngine.close() ends them. Starting the resource tracker now keeps it from
    # lifting the block later.
    with output_of_children():
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        multiprocessing.set_forkserver_preload([f"{__package__}.vllm_preload"])
        forkserver.ensure_running()


def fork_engine_core() -> None:
    """Make vLLM fork its engine core from the fork server."""
    with contextlib.suppress(ImportError):
        from vllm.v1.engine import utils

        utils.get_mp_context = EngineCoreContext  # type: ignore[attr-defined]


def kill_loading() -> None:
    """Kill every engine core of this program and its workers."""
    engines = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    if engines:
        from vllm.utils.system_utils import kill_process_tree

        for child in engines:
            if child.pid is not None:
                kill_process_tree(child.pid)


def _set_environment() -> None:
    """Set the variables that vLLM reads when it is imported and in its processes."""
    # No usage reports; logs go where the other logs go.
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # A process forked from this one would have gRPC's listening socket and half of its threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def _end_with_parent() -> None:
    """Kill this process once its parent has ended. vLLM's workers end with their engine core by themselves."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
