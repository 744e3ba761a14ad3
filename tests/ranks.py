"""Ranks: processes that train together, forked from a server process that has imported the training code."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.multiprocessing.spawn import start_processes

from . import forked  # noqa: F401 - it says what the fork server imports

WAIT = timedelta(seconds=280)
"""Longest wait of ranks for each other; only a hang lasts this long."""


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Call ``work(rank, *arguments)`` in a process for each rank, and wait for all of them."""
    start_processes(work, arguments, nprocs=ranks, start_method="forkserver")
