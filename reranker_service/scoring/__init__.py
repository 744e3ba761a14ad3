"""Scoring: scores pairs of texts; each distinct text is encoded once, and each distinct pair is scored once.

`scorer` is the entrance. `pairwise` scores with models that read both texts together, `embedding` with bi-encoders.
`texts` holds the texts, `encoding` tokenizes them, `cache` and `disk` keep earlier scores and embeddings.
"""

from ..scheduling import Ticket
from . import known_answer
from .costs import Costs, TableCosts
from .errors import EngineFailedError, OutOfMemoryError, OverLongError, ScoringError, TooShortLimitError
from .scorer import Scorer
from .texts import TextTable
from .types import OptionRanges, Pairs, Scored, ScoringOptions, Usage

__all__ = [
    "Costs",
    "EngineFailedError",
    "OptionRanges",
    "OutOfMemoryError",
    "OverLongError",
    "Pairs",
    "Scored",
    "Scorer",
    "ScoringError",
    "ScoringOptions",
    "TableCosts",
    "TextTable",
    "Ticket",
    "TooShortLimitError",
    "Usage",
    "known_answer",
]
