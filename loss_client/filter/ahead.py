"""Announcements: batches whose texts a rank sent to all others before their turn, with the texts of an earlier batch.

Each gather of texts carries the rank's present batch and, if the rank's collator has begun one, its next batch. When a
rank comes to a batch that it announced in this way, it sends the batch's number alone. A batch is announced or not on
each rank by itself: a rank without a next batch announces none, and one that trains another batch than it announced
sends that one's texts. Every rank therefore takes part in the same gathers, whatever its collator does.

All ranks keep the same announcements, because all see the same gathers in the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

Columns = Sequence[Sequence[str]]
"""Texts of one rank's batch by column."""

# Announced batches that are kept for each rank. More wait only if a rank announces batches and trains others.
_KEPT_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's batch.

    Attributes:
        number: The batch's number, of which this process gives each only once.
        columns: The texts by column; None in a message if the batch was announced.
    """

    number: int
    columns: Columns | None


@dataclass(frozen=True, slots=True)
class Message:
    """One rank's part of a gather.

    Attributes:
        present: The batch that the rank works on now.
        following: The batch that it announces; None if it announces none.
    """

    present: Batch
    following: Batch | None


class Announcements:
    """Announced batches of all ranks that have not been worked on.

    Args:
        ranks: Number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        self._of_rank: list[OrderedDict[int, Columns]] = [OrderedDict() for _ in range(ranks)]

    def message(self, rank: int, present: Batch, following: Batch | None) -> Message:
        """Return a rank's message, without the texts that all ranks have."""
        if present.number in self._of_rank[rank]:
            present = Batch(present.number, None)
        return Message(present, following)

    def take(self, messages: Sequence[Message]) -> list[Columns]:
        """Take note of the messages of all ranks, and return the texts of their present batches, in rank order."""
        found = []
        for announced, message in zip(self._of_rank, messages, strict=True):
            columns = announced.pop(message.present.number, None)
            if message.present.columns is not None:
                columns = message.present.columns
            if columns is None:
                raise RuntimeError(
                    f"a rank works on batch {message.present.number}, which it did not announce to this rank: the "
                    "ranks no longer take part in the same gathers. Start the training again from a checkpoint."
                )
            found.append(columns)
            if message.following is not None and message.following.columns is not None:
                announced[message.following.number] = message.following.columns
                if len(announced) > _KEPT_BATCHES:
                    announced.popitem(last=False)
        return found


_announcements: WeakKeyDictionary[Any, Announcements] = WeakKeyDictionary()


def announcements() -> Announcements:
    """Return the announcements of the default process group, which has to exist."""
    group = dist.group.WORLD
    if group not in _announcements:
        _announcements[group] = Announcements(dist.get_world_size())
    return _announcements[group]
