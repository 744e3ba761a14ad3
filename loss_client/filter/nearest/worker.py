"""Worker: runs functions one after the other in a background thread that exists only while there is work."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs functions in the order in which they are submitted, one at a time.

    The thread is a daemon: the interpreter's exit does not wait for it. A forked child begins without work, because the
    parent's thread does not exist there. A copy begins without work too.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()  # reentrant: a finalizer may submit or cancel on the thread that holds it
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = False

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run a function after those that were submitted before; its result or exception is in the future."""
        if os.getpid() != self._process:
            self._reset()
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, function))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="reranker-preselector", daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                future, function = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # readers of the future get it
                future.set_exception(error)

    def __reduce__(self) -> tuple[Any, ...]:
        return Worker, ()
