"""What every engine checks of its own results before it hands them out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class NonFiniteScoreError(ValueError):
    """The model computed something that is not a finite number.

    Attributes:
        values: All that it computed, shape ``(n, ...)``: what is wrong with one sequence is not the others' fault.
    """

    def __init__(self, message: str, values: NDArray[np.float32]) -> None:
        super().__init__(message)
        self.values = values


def finite(model: str, dtype: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pass ``values`` on.

    Args:
        model: The model's name, for the message.
        dtype: The number format of the computation, for the message.
        values: Scores, shape ``(n,)``, or embeddings, shape ``(n, dim)``.

    Raises:
        NonFiniteScoreError: One of them is infinite or no number.
    """
    if not np.isfinite(values).all():
        rows = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        raise NonFiniteScoreError(
            f"{model} gave {int(rows.sum())} of {len(values)} results that are not finite numbers in {dtype}; its "
            "weights are damaged, or it needs a number format with a wider range (float32 or bfloat16)",
            values,
        )
    return values
