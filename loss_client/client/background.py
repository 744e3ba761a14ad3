"""Background: the thread and the event loop of one client, made at first use and safe to fork.

A child process that uses gRPC objects of its parent hangs or crashes. Therefore every client ends its calls and
channels right before a fork, which also ends gRPC's own threads. After the fork, jobs in the parent continue over new
channels, and clients in the child start without thread, loop and channels.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from loss_client.client.channels import Channels
from loss_client.client.endpoints import ChannelSettings
from loss_client.client.errors import ClientClosedError, RerankerError
from loss_client.client.turns import ServerState

T = TypeVar("T")

_SUSPEND_SECONDS = 10.0
_STOP_SECONDS = 10.0

_backgrounds: weakref.WeakSet[Background] = weakref.WeakSet()
# A parent's loop shares its file descriptors with the child. The child must neither use nor close it, and garbage
# collection would close it, so the child keeps a reference.
_inherited: list[object] = []
# Whether other code's gRPC was still running when this process was forked from its parent.
_grpc_is_broken = False
_grpc_runs_at_fork = False
# Longest time that a fork waits for gRPC to end. After one timeout, other code is taken to keep gRPC running, and the
# limit becomes short.
_quiet_seconds = 5.0


class Background:
    """Runs coroutines for callers in other threads, and owns the channels that the coroutines use."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._settings = settings
        self._lock = threading.RLock()  # reentrant: a finalizer may run on the thread that holds it
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._channels: Channels | None = None
        _backgrounds.add(self)

    def submit(self, work: Callable[[Channels], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Start a coroutine that gets the channels; its future may be awaited and cancelled from any thread.

        Raises:
            ClientClosedError: ``close`` was called.
        """
        with self._lock:
            if self._closed:
                raise ClientClosedError("the client is closed")
            loop, channels = self._start()
            return asyncio.run_coroutine_threadsafe(work(channels), loop)

    def states(self) -> tuple[ServerState, ...]:
        """Return the state of each server."""
        channels = self._channels
        states = () if channels is None else channels.turns.states()
        return states or tuple(ServerState(str(address), "unused", None) for address in self._settings.addresses)

    def model(self) -> str | None:
        """Return the fingerprint of the client's model; None before the first answer of a server."""
        channels = self._channels
        return None if channels is None else channels.turns.model

    def close(self) -> None:
        """Cancel all coroutines, close the channels and end the thread. A second call has no effect."""
        with self._lock:
            self._closed = True
            loop, thread, channels = self._loop, self._thread, self._channels
            self._loop = self._thread = self._channels = None
        if loop is None or thread is None or channels is None:
            return
        asyncio.run_coroutine_threadsafe(_stop(loop, channels), loop)
        if thread is not threading.current_thread():  # the last reference to a client may end on its own loop's thread
            thread.join(_STOP_SECONDS)

    def _start(self) -> tuple[asyncio.AbstractEventLoop, Channels]:
        if self._loop is None or self._channels is None:
            if _grpc_is_broken:
                raise RerankerError(
                    "gRPC cannot work in this process, because it was forked while gRPC was running in its parent: "
                    "start it with the 'spawn' or 'forkserver' method instead"
                )
            self._loop = asyncio.new_event_loop()
            self._channels = Channels(self._settings)
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="reranker-client", daemon=True)
            self._thread.start()
        return self._loop, self._channels

    def before_fork(self) -> bool:
        """End calls and channels, if there are any, and keep the lock until ``after_fork``.

        Returns:
            Whether the client had been used.
        """
        self._lock.acquire()
        if self._loop is None or self._channels is None:
            return False
        done = asyncio.run_coroutine_threadsafe(self._channels.suspend(), self._loop)
        concurrent.futures.wait([done], timeout=_SUSPEND_SECONDS)
        return True

    def after_fork(self, in_child: bool) -> None:
        """Continue in the parent; in the child, forget thread, loop and channels."""
        if in_child:
            _inherited.extend((self._loop, self._thread, self._channels))
            self._loop = self._thread = self._channels = None
        elif self._loop is not None and self._channels is not None:
            self._loop.call_soon_threadsafe(self._channels.resume)
        self._lock.release()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_on_loop_error)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Errors of gRPC's own event handler are not reported. gRPC wakes every loop of the process for the events of one:
    # the other loops have nothing to read, or a closed socket after the process's last channel, and late events may
    # belong to a loop that is closed.
    error = context.get("exception")
    frames = traceback.extract_tb(error.__traceback__) if isinstance(error, OSError | RuntimeError) else []
    if not any("_handle_events" in frame.name for frame in frames):
        loop.default_exception_handler(context)


async def _stop(loop: asyncio.AbstractEventLoop, channels: Channels) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await channels.close()
    loop.stop()


_forking: list[Background] = []
_fork_lock = threading.Lock()  # two threads may fork at the same time


def _before_fork() -> None:
    global _grpc_runs_at_fork, _quiet_seconds
    _fork_lock.acquire()
    _forking[:] = list(_backgrounds)
    used = [background.before_fork() for background in _forking]
    if any(used) and _grpc_runs():
        # gRPC ends only after the last events of cancelled calls, and has no way to wait for that.
        gc.collect()
        deadline = time.monotonic() + _quiet_seconds
        while _grpc_runs():
            if time.monotonic() >= deadline:
                _quiet_seconds = 0.2
                break
            time.sleep(0.001)
    _grpc_runs_at_fork = _grpc_runs()


def _grpc_runs() -> bool:
    # gRPC's asyncio layer polls for events in a thread that lives as long as any channel, call or server.
    return any("_poll_wrapper" in thread.name for thread in threading.enumerate())


def _after_fork(in_child: bool) -> None:
    global _grpc_is_broken
    _grpc_is_broken = _grpc_is_broken or (in_child and _grpc_runs_at_fork)
    for background in _forking:
        background.after_fork(in_child)
    _forking.clear()
    _fork_lock.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(in_child=False),
    after_in_child=lambda: _after_fork(in_child=True),
)
