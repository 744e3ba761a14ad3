"""Text table: the texts of one request or stream, with the values that are computed once for each text."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..models import EncodedText
from ..scheduling import Ticket
from .cache import digest_of, scope_of
from .types import Role, ScoringOptions

# Texts that are hashed on the event loop, because the way to a thread takes longer: a fifth of a millisecond.
_FEW_TEXTS = 128
_FEW_CHARACTERS = 1 << 16
# Texts that are hashed on a thread at a time: some milliseconds, in part of which the thread holds the interpreter.
_PIECE_TEXTS = 2048
_PIECE_CHARACTERS = 1 << 20

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Embedding:
    """One embedded text.

    Attributes:
        vector: Unit norm, float32, shape ``(dim,)``.
        truncated: Whether the text was truncated.
        known: Whether the embedding came from a cache.
    """

    vector: NDArray[np.float32]
    truncated: bool
    known: bool = False


class OncePerText(Generic[Value]):
    """Values by text id, computed in groups. A caller that needs a value of a group in flight waits for that group."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}
        self._groups: dict[int, asyncio.Task[None]] = {}

    async def get(
        self, ids: NDArray[np.int64], compute: Callable[[list[int]], Awaitable[Sequence[Value]]]
    ) -> list[Value]:
        """Values of some ids.

        Args:
            ids: Text ids, in any order and with repetitions.
            compute: Computes the values of distinct ids; called with those that are neither known nor in flight.

        Returns:
            A value for each of ``ids``, in their order.
        """
        wanted: list[int] = ids.tolist()
        missing = [one for one in dict.fromkeys(wanted) if one not in self._values and one not in self._groups]
        if missing:
            group = asyncio.create_task(self._fill(missing, compute))
            # Retrieves the error, because all callers may have been cancelled; asyncio would report it otherwise.
            group.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._groups.update(dict.fromkeys(missing, group))
        for group in {self._groups[one] for one in wanted if one in self._groups}:
            # The cancellation of this caller must not end a group that other callers wait for.
            await asyncio.shield(group)
        return [self._values[one] for one in wanted]

    async def _fill(self, ids: list[int], compute: Callable[[list[int]], Awaitable[Sequence[Value]]]) -> None:
        try:
            self._values.update(zip(ids, await compute(ids), strict=True))
        finally:
            # After a failure the next caller computes the values again.
            for one in ids:
                del self._groups[one]

    def close(self) -> None:
        """Cancel the groups in flight, and drop the values."""
        for group in set(self._groups.values()):
            group.cancel()
        self._values.clear()


class TextTable:
    """Texts by id, in order of arrival, with the values that are computed once for each text.

    Attributes:
        texts: The texts; a text's id is its position.
        options: Options under which pairs of these texts are scored.
        ticket: The call that the texts belong to.
        encoded: Token ids of texts, by role; at most ``options.max_length`` of a text.
        measured: Tokens of whole texts, by role, of the few long texts for which the number matters.
        embedded: Embeddings of texts, by role; bi-encoders only.
    """

    def __init__(self, options: ScoringOptions, ticket: Ticket, texts: Sequence[str] = ()) -> None:
        self.texts = list(texts)
        self.options = options
        self.ticket = ticket
        self.encoded: dict[Role, OncePerText[EncodedText]] = {"query": OncePerText(), "document": OncePerText()}
        self.measured: dict[Role, OncePerText[int]] = {"query": OncePerText(), "document": OncePerText()}
        self.embedded: dict[Role, OncePerText[Embedding]] = {"query": OncePerText(), "document": OncePerText()}
        self._digests: list[bytes] = []
        self._hashing = asyncio.Lock()

    @cached_property
    def scope(self) -> bytes:
        """Digest of all that a cached score depends on except the model and the two texts.

        It leaves out the score type, because raw scores are cached. It includes the over-long option, because the score
        of a truncated pair must not answer a request that rejects over-long pairs.
        """
        options = self.options
        return scope_of(options.instruction, options.max_length, options.reject_over_long)

    async def digests(self) -> Sequence[bytes]:
        """Digests of the texts so far, by text id.

        Long texts are hashed on a thread, a piece at a time: a gibibyte takes more than a second.
        """
        until = len(self.texts)
        while len(self._digests) < until:
            async with self._hashing:
                begin = len(self._digests)
                piece, characters = _piece(self.texts, begin)
                if characters <= _FEW_CHARACTERS and len(piece) <= _FEW_TEXTS:
                    self._digests.extend(map(digest_of, piece))
                elif piece:
                    self._digests.extend(await asyncio.to_thread(_digests_of, piece))
        return self._digests

    def close(self) -> None:
        """Cancel the work in flight for these texts, and drop them: an error's traceback may hold the table longer."""
        for role in self.encoded:
            self.embedded[role].close()
            self.encoded[role].close()
            self.measured[role].close()
        self.texts.clear()


def _piece(texts: Sequence[str], begin: int) -> tuple[list[str], int]:
    """The next texts to hash at a time, and their characters."""
    characters, end = 0, begin
    while end < len(texts) and end - begin < _PIECE_TEXTS and characters < _PIECE_CHARACTERS:
        characters += len(texts[end])
        end += 1
    return list(texts[begin:end]), characters


def _digests_of(texts: Sequence[str]) -> list[bytes]:
    return list(map(digest_of, texts))
