"""The texts of one request or stream, and what is computed once for each of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..models.encoding import EncodedText, Encoder
from ..observing.metrics import Metrics
from ..rpc.validation import ScoringOptions
from ..scheduling.scheduler import Ticket
from .cache import digest_of, scope_of

_SLICE_CHARACTERS = 1 << 17

Value = TypeVar("Value")
Role = Literal["query", "document"]
"""The part a text plays in a pair; templates and prompts differ between the two."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """One embedded text.

    Attributes:
        vector: Unit norm, float32, shape ``(dim,)``.
        truncated: Whether the text was cut to fit.
        known: Whether it came from the cache.
    """

    vector: NDArray[np.float32]
    truncated: bool
    known: bool = False


class OncePerText(Generic[Value]):
    """Values by text id, computed in groups; a caller that needs an id under way waits for its group."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._groups: dict[int, asyncio.Task[None]] = {}

    async def get(
        self, ids: NDArray[np.int64], compute: Callable[[list[int]], Awaitable[Sequence[Value]]]
    ) -> list[Value]:
        """Values of ``ids``, in their order; ``compute`` is called with the distinct ids that nobody has asked for."""
        wanted: list[int] = ids.tolist()
        missing = [one for one in dict.fromkeys(wanted) if one not in self._values and one not in self._groups]
        if missing:
            group = asyncio.create_task(self._fill(missing, compute))
            # Marks an error as seen, should every caller have gone.
            group.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._groups.update(dict.fromkeys(missing, group))
        for group in {self._groups[one] for one in wanted if one in self._groups}:
            # Other callers may need the group, too: that this one is cancelled does not end it.
            await asyncio.shield(group)
        return [self._values[one] for one in wanted]

    async def _fill(self, ids: list[int], compute: Callable[[list[int]], Awaitable[Sequence[Value]]]) -> None:
        try:
            self._values.update(zip(ids, await compute(ids), strict=True))
        finally:
            # After a failure the next caller tries again.
            for one in ids:
                del self._groups[one]

    def close(self) -> None:
        """End what is under way."""
        for group in set(self._groups.values()):
            group.cancel()


class TextTable:
    """Texts by id, in order of arrival, with everything that is computed once for each.

    Attributes:
        texts: The texts; a text's id is its position.
        options: How pairs of these texts are scored.
        ticket: Whose texts they are.
        encoded: Token ids of texts, by the part they play.
        embedded: Embeddings of texts, by the part they play; bi-encoders only.
    """

    def __init__(self, options: ScoringOptions, ticket: Ticket, texts: Sequence[str] = ()) -> None:
        self.texts = list(texts)
        self.options = options
        self.ticket = ticket
        self.encoded: dict[Role, OncePerText[EncodedText]] = {"query": OncePerText(), "document": OncePerText()}
        self.embedded: dict[Role, OncePerText[Embedding]] = {"query": OncePerText(), "document": OncePerText()}
        self._digests: list[bytes] = []

    @cached_property
    def scope(self) -> bytes:
        """What a score depends on beside the model and the two texts, as a digest.

        Raw scores are kept, so the score type is no part of it. Rejecting is: a pair that was cut must not be found
        where it has to be refused.
        """
        options = self.options
        return scope_of(options.instruction, options.max_length, options.reject_over_long)

    def digests(self) -> Sequence[bytes]:
        """Digests of the texts so far, by text id."""
        self._digests.extend(map(digest_of, self.texts[len(self._digests) :]))
        return self._digests

    def close(self) -> None:
        """End what is under way for these texts."""
        for embedded in self.embedded.values():
            embedded.close()
        for encoded in self.encoded.values():
            encoded.close()


class _Turns:
    """One at a time; who is interactive goes before who is not, else in the order of asking."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())

    @asynccontextmanager
    async def take(self, interactive: bool) -> AsyncIterator[None]:
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
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        for queue in self._waiting:
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._taken = False


class TextEncoder:
    """Encodes texts of any number of tables, on a thread of its own.

    Texts are encoded a slice at a time, so that a large group neither holds up an interactive call nor goes on for a
    client that has gone.
    """

    def __init__(self, encoder: Encoder, metrics: Metrics) -> None:
        self._encoder = encoder
        self._metrics = metrics
        # One is enough: tokenizers spread a call over all cores by themselves.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")
        self._turns = _Turns()

    async def encode(self, table: TextTable, role: Role, ids: NDArray[np.int64]) -> list[EncodedText]:
        """Token ids of texts, in the order of ``ids``; each text is encoded once a table and role."""

        async def compute(missing: list[int]) -> list[EncodedText]:
            encoded: list[EncodedText] = []
            for texts in _slices([table.texts[one] for one in missing]):
                async with self._turns.take(table.ticket.interactive):
                    encoded += await asyncio.get_running_loop().run_in_executor(self._thread, encode, texts)
            return encoded

        def encode(texts: list[str]) -> list[EncodedText]:
            began = time.monotonic()
            if role == "query":
                encoded = self._encoder.encode_queries(texts, table.options.instruction)
            else:
                encoded = self._encoder.encode_documents(texts)
            self._metrics.encoded(time.monotonic() - began, len(texts))
            return encoded

        return await table.encoded[role].get(ids, compute)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _slices(texts: list[str]) -> Iterator[list[str]]:
    """Cut a list into parts that are encoded in some tens of milliseconds, of one text at least."""
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
