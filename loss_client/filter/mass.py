"""Choice of the candidates to score: those that hold nearly all of the softmax's mass."""

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
    """Which undecided candidates to score, so that the rest holds no more than epsilon of what is left after masking.

    Args:
        logits: Shape ``(rows, candidates)``.
        decided: Which candidates are masked or kept for good, same shape; the row's positive is.
        masked: Which of these are masked, same shape.
        epsilon: Largest share of the denominator without a score, in (0, 1).
        assume_masked: Whether to count on every chosen candidate being masked, so that the choice suffices whatever
            the scores are; else on none being masked.
        most: Most candidates to choose in each row, the most similar ones, shape ``(rows,)``. Default: no limit.

    Returns:
        The choice, same shape as ``logits``.
    """
    kept, undecided = _masses(logits, decided, masked)
    ascending = _sorted(undecided)
    tails = torch.cumsum(ascending, dim=1)
    # tails[k]: mass without a score if the k + 1 least similar undecided candidates are left out.
    limit = kept + (tails if assume_masked else tails[:, -1:])
    left_out = (tails <= epsilon * limit).sum(dim=1, keepdim=True)
    if most is not None:
        left_out = torch.maximum(left_out, tails.shape[1] - torch.from_numpy(most).to(tails.device)[:, None])
    # What weighs as much as the lightest that is needed is taken, too: where texts are equal it costs nothing.
    lightest = functional.pad(ascending, (0, 1), value=torch.inf).gather(1, left_out)
    return (undecided >= lightest) & (undecided > 0)


def unscored_share(logits: Tensor, decided: Tensor, masked: Tensor) -> Tensor:
    """The share of each row's denominator, after masking, that undecided candidates hold, shape ``(rows,)``."""
    kept, undecided = _masses(logits, decided, masked)
    left = undecided.sum(dim=1)
    return left / (kept[:, 0] + left)


def _masses(logits: Tensor, decided: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the kept candidates' softmax weights, ``(rows, 1)``, and the weights of the undecided ones, else 0."""
    if logits.device.type == "mps":  # has no doubles
        logits, decided, masked = logits.cpu(), decided.cpu(), masked.cpu()
    # Weights next to the largest kept one may be tiny and yet all that masking leaves: only doubles reach so far.
    exact = logits.double().masked_fill(masked, -torch.inf)
    weights = torch.exp(exact - exact.amax(dim=1, keepdim=True))
    return weights.masked_fill(~decided, 0).sum(dim=1, keepdim=True), weights.masked_fill(decided, 0)


def _sorted(weights: Tensor) -> Tensor:
    """Each row in ascending order."""
    if weights.device.type == "cpu":
        # Several times as fast as torch, which also finds out where each one was.
        return torch.from_numpy(np.sort(weights.numpy(), axis=1))
    return torch.sort(weights, dim=1).values
