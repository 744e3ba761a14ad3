"""Truncation: the number of tokens of each text that are kept if not all of them fit."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .tokens import EncodedText

Side = Literal["left", "right"]


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of both texts of a pair after truncation by the strategy "longest_first" of fast tokenizers.

    The longer text is truncated until both are equally long, then both of them are; the longer one keeps the odd token.
    (Slow tokenizers remove tokens one by one; their lengths can differ from these by one token.)

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
    # The longer text keeps the odd token; of equally long ones, the second.
    return (half, room - half) if first <= second else (room - half, half)


def query_and_document(query: int, document: int, room: int) -> tuple[int, int]:
    """Lengths of both texts after truncation of a query so long that it leaves no room for its document.

    The document gets half of the room, rounded up, or less if it is shorter; the query gets the rest.

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
    """The ``count`` tokens that are left after truncation at ``side``."""
    return ids[:count] if side == "right" else ids[len(ids) - count :]


def keep_used(ids: NDArray[np.int32], exact: bool, limit: int | None, side: Side = "right") -> EncodedText:
    """An encoded text with at most ``limit`` of its token ids: those that truncation at ``side`` can keep."""
    if limit is None or len(ids) <= limit:
        return EncodedText(ids, length=len(ids), exact=exact)
    # A copy, because a view would keep all ids in memory.
    return EncodedText(keep(ids, limit, side).copy(), length=len(ids), exact=exact)
