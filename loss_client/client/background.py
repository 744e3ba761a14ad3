"""The one thread and event loop of a client: made at first use, ended with the client or the process, safe to fork.

gRPC does not survive a fork: a child that uses what its parent began hangs or crashes. So right before a fork every
client of the process ends its calls and channels, which ends gRPC's own threads; right after it, jobs of the parent
go on where they were, over new channels, and clients in the child begin with nothing.
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

T = TypeVar("T")

_SUSPEND_SECONDS = 10.0
_STOP_SECONDS = 10.0

_backgrounds: weakref.WeakSet[Background] = weakref.WeakSet()
# Loops of the parent share its file descriptors: a child must neither use nor close (so: nor forget) them.
_inherited: list[object] = []
# Whether gRPC was still running, outside of this package, when this process was forked from its parent.
_grpc_is_broken = False
_grpc_runs_at_fork = False
# How long a fork waits for gRPC to end: on a busy machine a while, but not again where others keep it running.
_quiet_seconds = 5.0


class Background:
    """Runs coroutines for callers of other threads, over the channels that it owns."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._settings = settings
        self._lock = threading.RLock()  # a finalizer may run on a thread that holds it
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._channels: Channels | None = None
        _backgrounds.add(self)

    def submit(self, work: Callable[[Channels], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Start a coroutine over the channels; the future may be waited for and cancelled from any thread.

        Raises:
            ClientClosedError: ``close`` was called.
        """
        with self._lock:
            if self._closed:
                raise ClientClosedError("the client is closed")
            loop, channels = self._start()
            return asyncio.run_coroutine_threadsafe(work(channels), loop)

    def close(self) -> None:
        """Cancel everything, close the channels and end the thread. Does nothing the second time."""
        with self._lock:
            self._closed = True
            loop, thread, channels = self._loop, self._thread, self._channels
            self._loop = self._thread = self._channels = None
        if loop is None or thread is None or channels is None:
            return
        asyncio.run_coroutine_threadsafe(_stop(loop, channels), loop)
        if thread is not threading.current_thread():  # the last reference may be dropped on the loop's own thread
            thread.join(_STOP_SECONDS)

    def _start(self) -> tuple[asyncio.AbstractEventLoop, Channels]:
        if self._loop is None or self._channels is None:
            if _grpc_is_broken:
                raise RerankerError(
                    "this process was forked from one in which gRPC was running, so gRPC cannot work here: start it "
                    "with the 'spawn' or 'forkserver' method instead"
                )
            self._loop = asyncio.new_event_loop()
            self._channels = Channels(self._settings)
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="reranker-client", daemon=True)
            self._thread.start()
        return self._loop, self._channels

    def before_fork(self) -> bool:
        """End calls and channels, and return whether there may have been any; holds the lock until ``after_fork``."""
        self._lock.acquire()
        if self._loop is None or self._channels is None:
            return False
        done = asyncio.run_coroutine_threadsafe(self._channels.suspend(), self._loop)
        concurrent.futures.wait([done], timeout=_SUSPEND_SECONDS)
        return True

    def after_fork(self, in_child: bool) -> None:
        """Go on, or in the child begin with nothing."""
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
    # gRPC wakes every loop of a process for the news of one, and all but one find nothing to read; after the last
    # channel of the process they find the socket closed, and late news of a loop that is closed finds no loop.
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
_fork_lock = threading.Lock()  # two threads may fork at a time


def _before_fork() -> None:
    global _grpc_runs_at_fork, _quiet_seconds
    _fork_lock.acquire()
    _forking[:] = list(_backgrounds)
    used = [background.before_fork() for background in _forking]
    if any(used) and _grpc_runs():
        # What was cancelled is let go of when its last events have come, and gRPC tells nobody when that is.
        gc.collect()
        deadline = time.monotonic() + _quiet_seconds
        while _grpc_runs():
            if time.monotonic() >= deadline:
                _quiet_seconds = 0.2
                break
            time.sleep(0.001)
    _grpc_runs_at_fork = _grpc_runs()


def _grpc_runs() -> bool:
    # The thread by which gRPC's asyncio layer learns of events lives as long as any channel, call or server does.
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
