"""The texts of one request or stream, and what is computed once for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .encoding import EncodedText
from .scheduling import Ticket
from .validation import ScoringOptions

Value = TypeVar("Value")
Role = Literal["query", "document"]
"""The part a text plays in a pair; templates and prompts differ between the two."""


class Embedding:
    """One embedded text: a unit-norm float32 vector of shape ``(dim,)``, and whether the text was cut to fit."""

    __slots__ = ("truncated", "vector")

    def __init__(self, vector: NDArray[np.float32], truncated: bool) -> None:
        self.vector = vector
        self.truncated = truncated


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

    def close(self) -> None:
        """End what is under way for these texts."""
        for embedded in self.embedded.values():
            embedded.close()
        for encoded in self.encoded.values():
            encoded.close()
