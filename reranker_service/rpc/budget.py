"""Budget: the bytes that the server holds for all its clients together, and who waits for more.

A unary call takes what it needs at once, or is refused. A stream opens an account and waits for room; the oldest stream
whose need fits comes first. Streams may take seven eighths of the budget, so that interactive calls find room when
streams have filled their part. Streams that hold texts and wait for more could wait for each other for ever. A stream
that has waited for ``patience`` seconds with nothing in flight is therefore ended, the youngest first, one a second.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import BusyError

PATIENCE_SECONDS = 10.0
_FLAG = "--memory-bytes"


@dataclass(eq=False, slots=True)
class _Waiter:
    """A stream that waits for room.

    Attributes:
        account: The stream's account. An account has one waiter at most.
        amount: Bytes that it waits for.
        room: Done when it has them.
        stuck_since: Time since which the stream waits with nothing in flight; ``None`` while something is.
    """

    account: Account
    amount: int
    room: asyncio.Future[None]
    stuck_since: float | None = None


class Budget:
    """Bytes held for clients. All calls come from one event loop.

    Attributes:
        total: Most bytes that may be held.
        held: Bytes that are held.
    """

    def __init__(self, total: int, patience: float = PATIENCE_SECONDS) -> None:
        """Make an unused budget.

        Args:
            total: Most bytes that may be held.
            patience: Seconds that a stream with nothing in flight waits for room until it is ended.
        """
        self.total = total
        self.held = 0
        self._for_streams = total - total // 8
        self._patience = patience
        self._opened = 0
        self._waiting: list[_Waiter] = []  # the oldest stream first
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Hold the bytes of a unary call as long as the context lasts.

        Raises:
            BusyError: There is no room for them.
        """
        if amount > self.total:
            raise BusyError(
                f"the call needs {amount} bytes, and the server holds at most {self.total} for all clients; send less "
                f"at once, or raise {_FLAG}",
                retry_seconds=None,
            )
        if self.held + amount > self.total:
            raise BusyError(
                f"the call needs {amount} bytes, and the server holds {self.held} of at most {self.total} for its "
                f"clients; try again later, or raise {_FLAG}"
            )
        self.held += amount
        try:
            yield
        finally:
            self.give(amount)

    def open(self, in_flight: Callable[[], bool]) -> Account:
        """Open the account of a stream; ``in_flight`` tells whether the stream has pairs in flight."""
        self._opened += 1
        return Account(self, self._opened, in_flight)

    def give(self, amount: int) -> None:
        """Give bytes back, and let waiting streams have them."""
        self.held -= amount
        for waiter in self._waiting.copy() if self._waiting else ():
            # A waiter whose stream has just ended is cancelled already, and leaves the list in a moment.
            if not waiter.room.done() and self.held + waiter.amount <= self._for_streams:
                self.held += waiter.amount
                self._waiting.remove(waiter)
                waiter.room.set_result(None)

    async def take(self, account: Account, amount: int) -> None:
        """Wait until there is room for a stream's bytes; see ``Account.take``."""
        if self.held + amount <= self._for_streams:
            self.held += amount
            return
        if amount > self._for_streams:
            raise BusyError(
                f"the message needs {amount} bytes, and the server holds at most {self._for_streams} for all streams; "
                f"send less in one message, or raise {_FLAG}",
                retry_seconds=None,
            )
        waiter = _Waiter(account, amount, asyncio.get_running_loop().create_future())
        insort(self._waiting, waiter, key=lambda one: one.account.number)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience / 10, self._check)
        try:
            await waiter.room
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.room.cancelled() and waiter.room.exception() is None:
                self.give(amount)
            raise

    def _check(self) -> None:
        """End the youngest stream that has waited for too long, and look again while streams wait."""
        self._timer = None
        if not self._waiting:
            return
        now = time.monotonic()
        stuck: list[_Waiter] = []
        for waiter in self._waiting:
            if waiter.room.done():
                continue
            if waiter.account.in_flight():
                waiter.stuck_since = None
            elif waiter.stuck_since is None:
                waiter.stuck_since = now
            elif now - waiter.stuck_since >= self._patience:
                stuck.append(waiter)
        if stuck:
            youngest = max(stuck, key=lambda one: one.account.number)
            self._waiting.remove(youngest)
            youngest.room.set_exception(
                BusyError(
                    f"the stream waited {self._patience:g} s for {youngest.amount} bytes with nothing in flight, and "
                    f"the server holds {self.held} of at most {self._for_streams} for streams; try again later, or "
                    f"raise {_FLAG}"
                )
            )
        self._timer = asyncio.get_running_loop().call_later(self._patience / 10, self._check)


@dataclass(eq=False, slots=True)
class Account:
    """Bytes that one stream holds.

    Attributes:
        budget: The budget that they come from.
        number: Number of the stream in order of opening.
        in_flight: Tells whether the stream has pairs in flight: a result is to come, or to be taken by gRPC.
        held: Bytes that the stream holds.
        closed: Whether the stream has ended.
    """

    budget: Budget
    number: int
    in_flight: Callable[[], bool]
    held: int = 0
    closed: bool = False

    async def take(self, amount: int) -> None:
        """Wait for room, and hold the bytes.

        Raises:
            BusyError: They would never fit, or the stream waited too long with nothing in flight.
        """
        await self.budget.take(self, amount)
        self.held += amount

    def give(self, amount: int) -> None:
        """Give bytes back; has no effect after ``close``, which has given all of them back."""
        if not self.closed:
            self.held -= amount
            self.budget.give(amount)

    def close(self) -> None:
        """Give all bytes back."""
        self.give(self.held)
        self.closed = True
