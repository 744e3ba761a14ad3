"""Scoring: pairs of texts in, scores out, each distinct text encoded once and each distinct pair scored once.

`scorer` is the entrance. `pairwise` and `embedding` score with the two sorts of model, over the texts in `texts`;
`cache` and `disk` keep what is known.
"""

from ..scheduling import Ticket
from .errors import EngineFailedError, OverLongError, ScoringError, TooShortLimitError
from .scorer import Scorer
from .texts import TextTable
from .types import OptionRanges, Pairs, Scored, ScoringOptions, Usage

__all__ = [
    "EngineFailedError",
    "OptionRanges",
    "OverLongError",
    "Pairs",
    "Scored",
    "Scorer",
    "ScoringError",
    "ScoringOptions",
    "TextTable",
    "Ticket",
    "TooShortLimitError",
    "Usage",
]
