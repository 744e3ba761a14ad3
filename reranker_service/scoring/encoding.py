"""Text encoder: tokenizes the texts of all requests on one thread, interactive calls first, bulk work with a share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from ..models import EncodedText, Layout
from ..observing.metrics import Metrics
from ..scheduling import BulkShare
from .texts import TextTable
from .types import Role

_SLICE_CHARACTERS = 1 << 17
# An interactive slice counts with at least so many characters in the share of bulk work: a run of the tokenizer costs
# some tenths of a millisecond beside its characters.
_LEAST_CHARACTERS = 1 << 11


class _Turns:
    """A lock that interactive callers get first, apart from the share of the others.

    Callers of one priority get it in order of arrival.
    """

    def __init__(self, bulk_share: float) -> None:
        self._taken = False
        self._share = BulkShare(bulk_share, least=_LEAST_CHARACTERS)
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    @asynccontextmanager
    async def take(self, interactive: bool, characters: int) -> AsyncIterator[None]:
        if self._taken:
            turn = asyncio.get_running_loop().create_future()
            self._waiting[not interactive].append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        self._taken = True
        self._share.give(characters, bulk=not interactive, contested=bool(self._waiting[interactive]))
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        interactive, bulk = self._waiting
        for queue in (bulk, interactive) if self._share.is_due() else (interactive, bulk):
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._taken = False


class TextEncoder:
    """Encodes texts of any number of tables on a thread of its own.

    Texts are encoded a slice at a time, so that a large group does not delay an interactive call for long, and its work
    ends soon after its client has disconnected.
    """

    def __init__(self, layout: Layout, metrics: Metrics, bulk_share: float = 0.0) -> None:
        self._layout = layout
        self._metrics = metrics
        # One thread is enough, because a tokenizer spreads a call over all cores.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")
        self._turns = _Turns(bulk_share)

    async def encode(self, table: TextTable, role: Role, ids: NDArray[np.int64]) -> list[EncodedText]:
        """Token ids of texts, in the order of ``ids``; each text of a table is encoded once in each role.

        Of a long text only the token ids that ``max_length`` leaves room for are computed and kept.
        """
        limit = table.options.max_length
        return await table.encoded[role].get(ids, lambda missing: self._encode(table, role, missing, limit))

    async def measure(self, table: TextTable, role: Role, ids: NDArray[np.int64]) -> list[int]:
        """Tokens of whole texts, in the order of ``ids``; each text of a table is measured once in each role."""

        async def compute(missing: list[int]) -> list[int]:
            lengths: list[int] = []
            for one in missing:  # one at a time: all token ids of a text are in memory meanwhile
                lengths += [text.length for text in await self._encode(table, role, [one], None)]
            return lengths

        return await table.measured[role].get(ids, compute)

    async def _encode(self, table: TextTable, role: Role, ids: list[int], limit: int | None) -> list[EncodedText]:
        def encode(texts: list[str]) -> list[EncodedText]:
            began = time.monotonic()
            if role == "query":
                encoded = self._layout.encode_queries(texts, table.options.instruction, limit)
            else:
                encoded = self._layout.encode_documents(texts, limit)
            self._metrics.encoded(time.monotonic() - began, len(texts))
            return encoded

        encoded: list[EncodedText] = []
        for texts in _slices([table.texts[one] for one in ids]):
            async with self._turns.take(table.ticket.interactive, sum(map(len, texts))):
                encoded += await asyncio.get_running_loop().run_in_executor(self._thread, encode, texts)
        return encoded

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _slices(texts: list[str]) -> Iterator[list[str]]:
    """Cut a list into slices of at least one text that take some tens of milliseconds to encode."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and characters + len(text) > _SLICE_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    if part:
        yield part
