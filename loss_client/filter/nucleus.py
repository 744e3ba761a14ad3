"""Nucleus: the candidates to score with ``top_p``, those that hold all but a small share of each row's softmax.

An unscored candidate stays a negative. If the unscored candidates of a row hold the share u of the softmax denominator
that is left after masking, the row's loss is above the loss with all scores by at most ``-log(1 - u)``, because further
scores can at most remove all of their mass from the denominator. So each row has candidates scored, the most similar
first, until u is at most epsilon, which is ``1 - top_p``.

1. ``split`` looks once at the logits of each mini-batch, on the model's device. It lists the candidates that may have
   to be scored, and sums up all others: these hold at most epsilon whatever the scores are.
2. ``Shortlist.choose`` names the candidates that suffice if none of them is masked.
3. ``Shortlist.settle`` takes what their scores decided. Masking shrinks the denominator, so that a row may need more:
   (2) and (3) are repeated until no row does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """Undecided candidates of some rows, in two parts.

    Attributes:
        codes: ``row * candidates + candidate`` of those that may have to be scored, shape ``(listed,)``.
        logits: Their logits, shape ``(listed,)``.
        kept: Logarithm of the sum of the weights (exponentials of logits) of each row's kept candidates, shape
            ``(rows,)``.
        rest: Logarithm of the sum of the weights of the undecided candidates that are not listed, shape ``(rows,)``.
    """

    codes: Tensor
    logits: Tensor
    kept: Tensor
    rest: Tensor


def split(logits: Tensor, kept: NDArray[np.int64], masked: NDArray[np.int64], epsilon: float) -> Split:
    """List the undecided candidates that may have to be scored.

    A candidate is left out if its weight is at most ``epsilon / candidates`` of that of the row's kept candidates: all
    of these together hold at most epsilon of the denominator, which never falls below the kept candidates.

    Args:
        logits: Shape ``(rows, candidates)``.
        kept: ``row * candidates + candidate`` of the candidates that are known to be kept; at least one in each row.
        masked: The same for those that are known to be masked.
        epsilon: Largest share of the denominator without a score, in (0, 1).
    """
    rows, candidates = logits.shape
    known, dropped = (torch.from_numpy(codes).to(logits.device) for codes in (kept, masked))
    flat = logits.flatten()
    lines, weights = known // candidates, flat[known]
    # Relative to the largest kept one, because logits reach 1 / temperature, whose exponential may overflow.
    highest = weights.new_full((rows,), -torch.inf).scatter_reduce(0, lines, weights, "amax")
    total = torch.zeros_like(highest).index_add(0, lines, torch.exp(weights - highest[lines]))
    mass = highest + total.log()
    floors = (mass + math.log(epsilon / candidates))[:, None]  # (rows, 1)
    open_ = flat.index_fill(0, torch.cat([known, dropped]), -torch.inf).view(rows, candidates)
    listed = open_ > floors
    codes = listed.flatten().nonzero()[:, 0]
    # A listed candidate counts as 1 in the sum.
    lighter = torch.exp(torch.minimum(open_, floors) - floors).sum(1) - listed.sum(1)
    rest = floors[:, 0] + lighter.clamp(min=0).log()
    return Split(codes, open_.flatten()[codes], mass, rest)


class Shortlist:
    """The candidates of a step that may have to be scored, each row's most similar first.

    Args:
        splits: The splits of all rows, a mini-batch each, in order.
        candidates: Number of candidates of a row.

    Attributes:
        codes: ``row * candidates + candidate``, shape ``(listed,)``.
        rows: The row of each, same shape.
    """

    def __init__(self, splits: Sequence[Split], candidates: int) -> None:
        sizes = [len(one.kept) for one in splits]
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        codes = torch.cat([one.codes + first * candidates for one, first in zip(splits, firsts, strict=True)])
        # float64, because scores may mask the largest weights, and those that are left may be too small for float32.
        logits = torch.cat([one.logits for one in splits]).cpu().double().numpy()
        self._kept, self._rest = (
            torch.cat(parts).cpu().double().numpy()
            for parts in ([one.kept for one in splits], [one.rest for one in splits])
        )
        found = codes.cpu().numpy()
        rows = found // candidates
        # One key for both sorts: rows in order, and falling logits in each row.
        span = logits.max(initial=0.0) - logits.min(initial=0.0) + 1.0
        order = np.argsort(rows * span + (logits.max(initial=0.0) - logits))
        self.codes, self.rows, self._logits = found[order], rows[order], logits[order]
        self._asked, self._decided, self._masked = (np.zeros(len(found), dtype=np.bool_) for _ in range(3))
        self._shares = np.full(sum(sizes), np.nan)
        self._find_rows()

    def choose(self, epsilon: float, least: NDArray[np.int64], most: NDArray[np.int64] | None) -> NDArray[np.intp]:
        """Choose candidates to score, each at most once over all calls.

        Candidates of rows that need no more leave ``codes`` and ``rows``.

        Args:
            epsilon: Largest share of the denominator without a score, in (0, 1).
            least: Fewest candidates of a row that needs any, as far as it has them, shape ``(rows,)``.
            most: Most candidates of each row, shape ``(rows,)``. Default: no limit.

        Returns:
            Positions in ``codes``: of each row the most similar candidates, as many as suffice if none is masked. Empty
            once every row's share is at most epsilon, or has no candidate left.
        """
        weights, kept, rest = self._masses()
        some = self._begins < self._ends
        self._shares = np.where(some | np.isnan(self._shares), rest / (kept + rest), self._shares)
        limits = epsilon * (kept + rest)
        open_ = ~self._asked
        # Mass of the row's heavier candidates, over which the choice goes on until the others are within the limit.
        sums = np.cumsum(weights)
        room = np.append(0.0, sums)[self._begins] + rest - limits
        active = some & (rest > limits)
        chosen = open_ & (sums - weights < np.where(active, room, -np.inf)[self.rows])
        if most is not None or least.any():
            opened = np.cumsum(open_.astype(np.int64))
            rank = opened - np.append(0, opened)[self._begins][self.rows] - 1
            chosen |= open_ & (rank < np.where(active, least, 0)[self.rows])
            if most is not None:
                chosen &= rank < most[self.rows]
        self._asked |= chosen
        staying = active[self.rows]
        self.codes, self.rows, self._logits = self.codes[staying], self.rows[staying], self._logits[staying]
        self._asked, self._decided, self._masked = (
            flags[staying] for flags in (self._asked, self._decided, self._masked)
        )
        self._find_rows()
        return np.flatnonzero(chosen[staying])

    def _find_rows(self) -> None:
        numbers = np.arange(len(self._shares))
        self._begins = np.searchsorted(self.rows, numbers)
        self._ends = np.searchsorted(self.rows, numbers, side="right")

    def settle(self, chosen: NDArray[np.intp], decided: NDArray[np.bool_], masked: NDArray[np.bool_]) -> None:
        """Take what scores decided.

        Args:
            chosen: Positions in ``codes``, as ``choose`` returned them.
            decided: Whether each is known to be masked or kept, same shape.
            masked: Whether each is known to be masked, same shape.
        """
        self._decided[chosen], self._masked[chosen] = decided, masked

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of each row's denominator that undecided candidates held at the last choice, after masking, (rows,)."""
        return self._shares

    def _masses(self) -> tuple[NDArray[np.float64], ...]:
        """Return weights, 1 for the largest one of a row that is not masked.

        Returns:
            (Weights of the listed candidates, 0 for decided ones, shape ``(listed,)``; the sums over each row's kept
            candidates, and over its undecided ones, listed or not, each of shape ``(rows,)``).
        """
        fresh = not self._decided.any()
        logits = self._logits if fresh else np.where(self._masked, -np.inf, self._logits)
        highest, some = self._kept.copy(), self._begins < self._ends
        if len(logits):
            highest[some] = np.maximum(highest[some], np.maximum.reduceat(logits, self._begins[some]))
        weights = np.exp(logits - highest[self.rows])
        kept, rest = np.exp(self._kept - highest), np.exp(self._rest - highest)
        undecided = weights if fresh else np.where(self._decided, 0.0, weights)
        if not fresh:
            kept += np.bincount(self.rows, weights - undecided, len(highest))
        rest += np.bincount(self.rows, undecided, len(highest))
        return undecided, kept, rest


def unscored_fraction(logits: Tensor, decided: Tensor, masked: Tensor) -> Tensor:
    """Return the share of each row's denominator, after masking, that undecided candidates hold, shape ``(rows,)``.

    Args:
        logits: Shape ``(rows, candidates)``.
        decided: True for candidates that are known to be masked or kept, same shape.
        masked: True for candidates that are masked, same shape.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.softmax(logits.masked_fill(masked, -torch.inf), dim=1, dtype=exact)
    return weights.masked_fill_(decided, 0).sum(dim=1)
