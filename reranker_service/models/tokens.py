"""Token sequences: a text as token ids, and the input that an engine runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
"""Token ids, shape ``(tokens,)``."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text as token ids.

    Attributes:
        ids: Token ids without special tokens, int32, shape ``(tokens,)``. The text's prompt, or its part of the
            template, is included. Of a text that was encoded up to a limit, only as many as the limit: those that
            truncation keeps.
        head: Number of leading tokens that belong to the template and are never truncated.
        length: Tokens of the whole text; if ``exact`` is false, a number above the limit that it has at least.
        exact: Whether ``length`` is the number of tokens of the whole text.
    """

    ids: Ids
    head: int = 0
    length: int = -1
    exact: bool = True

    def __post_init__(self) -> None:
        if self.length < 0:
            object.__setattr__(self, "length", len(self.ids))


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One input of a model.

    Attributes:
        ids: Token ids with all special and template tokens, int32, shape ``(length,)``.
        first_segment: Number of leading tokens of segment 0; all later tokens are of segment 1. The whole length for
            models that know only one segment.
    """

    ids: Ids
    first_segment: int
