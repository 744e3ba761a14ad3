"""How many tokens of each text are kept where not all fit."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["left", "right"]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths to keep of a pair, as fast tokenizers' strategy "longest_first" has it.

    The longer text is cut until both are equally long, then both are, the second keeping the odd token. (Slow
    tokenizers take tokens away one by one, which can end one token apart.)

    Args:
        first: Tokens of the first text, special tokens not counted.
        second: Tokens of the second text.
        room: Tokens that fit, at least 0.

    Returns:
        Tokens to keep of the first and of the second text; their sum is ``min(first + second, room)``.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if 2 * shorter <= room:
        # The shorter text stays whole.
        return (first, room - first) if first <= second else (room - second, second)
    half = room // 2
    # Which of the two counts as the shorter decides who gets the odd token.
    return (half, room - half) if first <= second else (room - half, half)


def query_and_document(query: int, document: int, room: int) -> tuple[int, int]:
    """Lengths to keep where a query is so long that it leaves no room for its document.

    The document gets half of the room (the odd token is its own), or less if it is shorter; the query gets the rest.

    Args:
        query: Tokens of the query, at least ``room``.
        document: Tokens of the document.
        room: Tokens that fit, at least 2.

    Returns:
        Tokens to keep of the query and of the document.
    """
    kept = min(document, room - room // 2)
    return min(query, room - kept), kept


def keep(ids: NDArray[np.int32], count: int, side: Side) -> NDArray[np.int32]:
    """The ``count`` tokens that are left after cutting at ``side``."""
    return ids[:count] if side == "right" else ids[len(ids) - count :]
