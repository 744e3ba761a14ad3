"""Ticket: a batch's scoring job on its way from the data collator to the loss.

The collator runs one batch ahead of training, so a job that begins there has a whole step to finish. The batch carries
a ticket, which holds the job. A loader worker is another process and cannot hand a job over: its ticket carries only
the texts, and the job begins when the ticket arrives in the process that trains. A ticket that is dropped, because
training ends or skips the batch, cancels its job.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch.utils.data import get_worker_info

from loss_client.filter.step import FilterStep

TICKET = "reranker_ticket"
"""Key in the first column's features for the batch's ticket."""


class BeginsSteps(Protocol):
    """An object that begins the scoring of batches; the data collator is one."""

    def begin(
        self, columns: Sequence[Sequence[str]], dataset: str | None, instruction: str | None
    ) -> FilterStep | None:
        """Begin to score a batch of a dataset; ``None`` if the loss begins the scoring itself."""


_sources: WeakValueDictionary[str, BeginsSteps] = WeakValueDictionary()


def register(source: BeginsSteps) -> str:
    """Return a name under which tickets from other processes find ``source`` in this process."""
    name = uuid.uuid4().hex
    _sources[name] = source
    return name


class Ticket:
    """A batch's instruction, and its job if that has begun.

    Args:
        source: Name of the object that begins the job, as ``register`` returned it.
        columns: The texts by column.
        dataset: Name of the batch's dataset, if there are several.
        instruction: The instruction for this batch; ``None`` for the loss's own.
    """

    def __init__(
        self, source: str, columns: Sequence[Sequence[str]], dataset: str | None, instruction: str | None
    ) -> None:
        self.instruction = instruction
        self._source = source
        self._columns = columns
        self._dataset = dataset
        self._step: FilterStep | None = None
        # A loader worker cannot hand its job over to the process that trains.
        begins = None if get_worker_info() is not None else _sources.get(source)
        if begins is not None:
            self._step = begins.begin(columns, dataset, instruction)
        if self._step is not None:
            self._finalizer = weakref.finalize(self, self._step.cancel)
            self._finalizer.atexit = False

    def take(self) -> FilterStep | None:
        """Return the job, which the caller now has to cancel if unused; ``None`` if there is none, or it was taken."""
        step, self._step = self._step, None
        if step is not None:
            self._finalizer.detach()
        return step

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self._source, self._columns, self._dataset, self.instruction)
