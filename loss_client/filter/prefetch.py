"""A batch's scoring job on its way from the collator to the loss.

The collator runs one batch ahead of training, so a job that begins there has a whole step to finish. What travels in
the batch is a ticket. It holds the job in the process that trains; between processes only texts travel, and the job
begins where the batch arrives. A ticket that is dropped, as training ends or skips the batch, cancels its job.
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
"""Key of the first column's features under which the data collator puts the batch's ticket."""


class BeginsSteps(Protocol):
    """Begins the scoring of batches; the data collator is one."""

    def begin(
        self, columns: Sequence[Sequence[str]], dataset: str | None, instruction: str | None
    ) -> FilterStep | None:
        """Begin to score a batch of a dataset; ``None`` if there is nothing to begin before the loss runs."""


_sources: WeakValueDictionary[str, BeginsSteps] = WeakValueDictionary()


def register(source: BeginsSteps) -> str:
    """Let tickets that arrive from other processes find who begins their jobs here; returns its name."""
    name = uuid.uuid4().hex
    _sources[name] = source
    return name


class Ticket:
    """One batch: its instruction, and its job if that has begun.

    Args:
        source: Name of who begins its job, as registered.
        columns: The texts by column.
        dataset: Name of the dataset that the batch is from, where there are several.
        instruction: What the reranker is told for this batch; ``None`` leaves it to the loss.
    """

    def __init__(
        self, source: str, columns: Sequence[Sequence[str]], dataset: str | None, instruction: str | None
    ) -> None:
        self.instruction = instruction
        self._source = source
        self._columns = columns
        self._dataset = dataset
        self._step: FilterStep | None = None
        # A loader's worker cannot hand on a job: it begins where the batch arrives.
        begins = None if get_worker_info() is not None else _sources.get(source)
        if begins is not None:
            self._step = begins.begin(columns, dataset, instruction)
        if self._step is not None:
            self._finalizer = weakref.finalize(self, self._step.cancel)
            self._finalizer.atexit = False

    def take(self) -> FilterStep | None:
        """Hand over the job, whose owner the caller becomes; ``None`` if there is none, or it was taken."""
        step, self._step = self._step, None
        if step is not None:
            self._finalizer.detach()
        return step

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self._source, self._columns, self._dataset, self.instruction)
