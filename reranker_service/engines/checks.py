"""Check of an engine's results: they must be finite numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class NonFiniteScoreError(ValueError):
    """The model computed a value that is not a finite number.

    Attributes:
        values: All results of the batch, shape ``(n, ...)``, so that sequences with finite results can be answered.
    """

    def __init__(self, message: str, values: NDArray[np.float32]) -> None:
        super().__init__(message)
        self.values = values


def finite(model: str, dtype: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``values`` if all of them are finite.

    Args:
        model: The model's name, for the message.
        dtype: The number format of the computation, for the message.
        values: Scores, shape ``(n,)``, or embeddings, shape ``(n, dim)``.

    Raises:
        NonFiniteScoreError: A value is infinite or NaN.
    """
    if not np.isfinite(values).all():
        rows = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        raise NonFiniteScoreError(
            f"{model} gave {int(rows.sum())} of {len(values)} results that are not finite numbers in {dtype}; its "
            "weights are damaged, or it needs a number format with a wider range (float32 or bfloat16)",
            values,
        )
    return values
