"""Ticket: a batch's scoring job on its way from the data collator to the loss.

The collator runs one batch ahead of training, so a job that begins there has a whole step to finish. The batch carries
a ticket, which holds the job. A loader worker is another process and cannot hand a job over: its ticket carries only
the texts, and the job begins when the ticket arrives in the process that trains. A ticket that is dropped, because
training ends or skips the batch, cancels its job.

Over several ranks, ``next_step`` finds the batch whose texts are sent to the other ranks with those of the present one.
"""

from __future__ import annotations

import threading
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


_waiting: list[weakref.ref[Ticket]] = []  # tickets with a job that has begun, in the order in which the jobs began
_waiting_lock = threading.Lock()  # a loader's thread that pins memory makes tickets too

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
            with _waiting_lock:
                _waiting.append(weakref.ref(self))

    @property
    def step(self) -> FilterStep | None:
        """The job; ``None`` if there is none, or it was taken."""
        return self._step

    def take(self) -> FilterStep | None:
        """Return the job, which the caller now has to cancel if unused; ``None`` if there is none, or it was taken."""
        step, self._step = self._step, None
        if step is not None:
            self._finalizer.detach()
        return step

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self._source, self._columns, self._dataset, self.instruction)


def next_step() -> FilterStep | None:
    """Return the first step whose job has begun, whose turn has not come, and whose texts the other ranks lack."""
    with _waiting_lock:
        tickets = [(reference, ticket) for reference in _waiting if (ticket := reference()) is not None]
        # Without the tickets that were dropped or taken.
        kept = [(reference, step) for reference, ticket in tickets if (step := ticket.step) is not None]
        _waiting[:] = [reference for reference, _ in kept]
    steps = (step for _, step in kept)
    return next((step for step in steps if step.gathers and not step.announced and not step.failed()), None)
