"""Choice of the candidates to score: those that hold all but a small share of the softmax's mass.

An unscored candidate stays a negative. If the unscored candidates of a row hold the share u of the softmax denominator
that is left after masking, the row's loss is above the loss with all scores by at most ``-log(1 - u)``, because further
scores can at most remove all of their mass from the denominator. So each row has candidates scored, the most similar
first, until u is at most epsilon.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def choose(
    logits: Tensor,
    decided: Tensor,
    masked: Tensor,
    epsilon: float,
    *,
    assume_masked: bool,
    most: NDArray[np.int64] | None = None,
) -> Tensor:
    """Choose undecided candidates to score, so that the others hold at most epsilon of the denominator after masking.

    Args:
        logits: Shape ``(rows, candidates)``.
        decided: True for candidates that are known to be masked or kept, such as the positive, same shape.
        masked: True for candidates that are masked, same shape.
        epsilon: Largest share of the denominator without a score, in (0, 1).
        assume_masked: True: the choice suffices even if every chosen candidate will be masked. False: it suffices if
            none will be.
        most: Most candidates to choose in each row, shape ``(rows,)``; the most similar are chosen. Default: no limit.

    Returns:
        True for the chosen candidates, same shape as ``logits``.
    """
    kept, undecided = _masses(logits, decided, masked)
    ascending = _sorted(undecided)
    tails = torch.cumsum(ascending, dim=1)
    # tails[:, k]: mass without a score if the k + 1 least similar undecided candidates are left out.
    limit = kept + (tails if assume_masked else tails[:, -1:])
    left_out = (tails <= epsilon * limit).sum(dim=1, keepdim=True)
    if most is not None:
        left_out = torch.maximum(left_out, tails.shape[1] - torch.from_numpy(most).to(tails.device)[:, None])
    # Ties with the lightest needed candidate are chosen too: equal texts tie, and need no further score.
    lightest = functional.pad(ascending, (0, 1), value=torch.inf).gather(1, left_out)
    return (undecided >= lightest) & (undecided > 0)


def unscored_share(logits: Tensor, decided: Tensor, masked: Tensor) -> Tensor:
    """Return the share of each row's denominator, after masking, that undecided candidates hold, shape ``(rows,)``.

    For the arguments see :func:`choose`.
    """
    kept, undecided = _masses(logits, decided, masked)
    left = undecided.sum(dim=1)
    return left / (kept[:, 0] + left)


def _masses(logits: Tensor, decided: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum of the softmax weights of kept candidates, weights of undecided ones with 0 for all others).

    Shapes ``(rows, 1)`` and ``(rows, candidates)``.
    """
    if logits.device.type == "mps":  # MPS has no float64
        logits, decided, masked = logits.cpu(), decided.cpu(), masked.cpu()
    # float64, because scores may mask the largest weights, and those that are left may be too small for float32.
    exact = logits.double().masked_fill(masked, -torch.inf)
    weights = torch.exp(exact - exact.amax(dim=1, keepdim=True))
    return weights.masked_fill(~decided, 0).sum(dim=1, keepdim=True), weights.masked_fill(decided, 0)


def _sorted(weights: Tensor) -> Tensor:
    """Sort each row in ascending order."""
    if weights.device.type == "cpu":
        # Several times as fast as torch.sort, which also computes the indices.
        return torch.from_numpy(np.sort(weights.numpy(), axis=1))
    return torch.sort(weights, dim=1).values
