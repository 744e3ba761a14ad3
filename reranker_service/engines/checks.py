"""Checks of an engine's results, and the errors of batches that gave some results or none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class WrongResultError(RuntimeError):
    """The engine gave something that is not one result for each sequence of its batch."""


class PartialResultError(RuntimeError):
    """Some sequences of a batch have no result.

    Attributes:
        values: All results of the batch, shape ``(n, ...)``, so that sequences with finite results can be answered. The
            other rows are not finite.
    """

    def __init__(self, message: str, values: NDArray[np.float32]) -> None:
        super().__init__(message)
        self.values = values


class NonFiniteScoreError(PartialResultError):
    """The model computed a value that is not a finite number."""


class EngineMemoryError(PartialResultError):
    """The memory of the engine's device does not suffice for a sequence, even if the sequence is alone in its batch."""


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


def one_each(values: object, count: int) -> NDArray[np.float32]:
    """Return ``values`` if they are an array with one row of numbers for each of ``count`` sequences.

    Raises:
        WrongResultError: They are something else.
    """
    if not isinstance(values, np.ndarray):
        raise WrongResultError(f"the engine gave a {type(values).__name__} for {count} sequences, not an array")
    if values.ndim == 0 or len(values) != count:
        raise WrongResultError(
            f"the engine gave an array of shape {values.shape} for {count} sequences; it must give one row each"
        )
    if values.dtype.kind not in "fiu":
        raise WrongResultError(f"the engine gave an array of {values.dtype}, not of numbers")
    return values
