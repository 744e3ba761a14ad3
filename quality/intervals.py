"""Per-query results as text."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(values: Sequence[float]) -> str:
    """Write numbers in [0, 1] as a short text; they are rounded to float16, that is, by 0.00025 at most."""
    return base64.b64encode(np.asarray(values, dtype="<f2").tobytes()).decode("ascii")


def unpack(text: str) -> NDArray[np.float64]:
    """Read the numbers that :func:`pack` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
