"""Watchdog: notices that the engine holds work and finishes none of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from .scheduler import Scheduler

_LONGEST_PAUSE_SECONDS = 1.0

log = structlog.get_logger()


async def watch_stalls(scheduler: Scheduler, seconds: float, report: Callable[[bool], Awaitable[object]]) -> None:
    """Report each stall and its end; runs until it is cancelled.

    Args:
        scheduler: The scheduler of the engine.
        seconds: Time without a finished batch, while the engine holds work, that makes a stall; above 0.
        report: Called with true when a stall begins, and with false when the engine has finished a batch again.
    """
    stalled = False
    while True:
        await asyncio.sleep(min(seconds / 4, _LONGEST_PAUSE_SECONDS))
        idle = scheduler.stalled_seconds()
        if (idle >= seconds) == stalled:
            continue
        stalled = not stalled
        if stalled:
            log.error(
                "engine stalled",
                sequences=scheduler.running,
                seconds=round(idle, 1),
                rule="health is NOT_SERVING until a batch finishes; restart the server if none does",
            )
        else:
            log.info("engine works again", sequences=scheduler.running)
        await report(stalled)
