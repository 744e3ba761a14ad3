"""Turns: lets streams go on one after the other, one in each pass of the event loop.

In one pass the event loop runs everything that is ready, and gRPC accepts one new call in every second pass. If each of
many streams handled a chunk in every pass, passes would take long, and new calls, health checks among them, would wait
for as many passes as calls came before them: 16 streams that never read and 64 other clients made a health check take
ten seconds.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """A queue of streams with something to do. All calls come from one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False  # the turn of this pass

    async def take(self) -> None:
        """Return when it is the caller's turn: at once, unless another caller had its turn in this pass."""
        loop = asyncio.get_running_loop()
        if self._taken:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
        else:
            self._taken = True
            loop.call_soon(self._pass_on)

    def _pass_on(self) -> None:
        """Give the turn of the next pass to the first one that still waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._pass_on)
                return
        self._taken = False
