"""Known answer: a query with a relevant and an irrelevant document, which shows a model whose head was lost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..scheduling import Ticket
from .scorer import Scorer
from .texts import TextTable
from .types import Pairs

QUERY = "What is the capital of France?"
RELEVANT = "Paris is the capital of France, and its largest city."
IRRELEVANT = "Apple trees grow best in deep soil that drains well."


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """Raw scores of the two documents."""

    relevant: float
    irrelevant: float

    @property
    def equal(self) -> bool:
        """Whether the model tells the documents apart not at all: its head is missing, or all of its weights are."""
        return self.relevant == self.irrelevant

    @property
    def wrong(self) -> bool:
        """Whether the irrelevant document has the higher score."""
        return self.relevant < self.irrelevant


async def ask(scorer: Scorer) -> KnownAnswer:
    """Score the query with both documents. Raises what ``Scorer.score`` raises."""
    options = replace(scorer.ranges.defaults, raw=True)
    table = TextTable(options, Ticket("known answer", interactive=True), [QUERY, RELEVANT, IRRELEVANT])
    try:
        scored = await scorer.score(table, Pairs(np.array([0]), np.array([1, 2]), grid=True))
    finally:
        table.close()
    relevant, irrelevant = scored.scores.tolist()
    return KnownAnswer(relevant, irrelevant)
