"""Calibration: the temperature at which a guide's distributions have a given mean entropy.

Scores are reduced to the mean entropy at each temperature of a fixed grid. These means of several steps and ranks add
up, so that the temperature can be computed from all of them without the scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 10
"""Number of training steps whose scores set the temperature."""

ROWS = 64
"""Most rows of a step and rank that are looked at. The first ones, because their scores arrive first."""

# Four temperatures an octave, 2e-4 to 4e3: from the spread of cosines to that of unbounded scores.
_GRID = 2.0 ** np.arange(-12, 12.25, 0.25)


def entropy_sums(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the number of rows, and for each temperature of the grid the sum over rows of their relative entropies.

    A row's relative entropy is the entropy of ``softmax(scores / temperature)`` over its largest possible value, the
    logarithm of the row's number of scores. Rows with fewer than two scores do not count.

    Args:
        scores: Raw scores, NaN where there is none, shape ``(rows, documents)``.

    Returns:
        Shape ``(1 + temperatures,)``.
    """
    counts = np.isfinite(scores).sum(axis=1)
    rows = scores[counts > 1].astype(np.float64)
    if not len(rows):
        return np.zeros(1 + len(_GRID))
    rows -= np.nanmax(rows, axis=1, keepdims=True)
    rows[np.isnan(rows)] = -1e30  # a weight of exactly 0, and 0 times this number is 0
    sums = [float(len(rows))]
    for temperature in _GRID:
        exponents = rows / temperature
        weights = np.exp(exponents)
        total = weights.sum(axis=1)
        entropies = np.log(total) - (weights * exponents).sum(axis=1) / total
        sums.append(float((entropies / np.log(counts[counts > 1])).sum()))
    return np.array(sums)


class Calibration:
    """Sums of relative entropies over the first steps of training.

    Attributes:
        steps: Number of steps added.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums = np.zeros(1 + len(_GRID))

    @property
    def frozen(self) -> bool:
        """Whether all steps have been added that the temperature depends on."""
        return self.steps >= STEPS

    def add(self, sums: NDArray[np.float64]) -> None:
        """Add one step's sums, over all ranks. A step without scores, or after the last step, is not counted."""
        if sums[0] and not self.frozen:
            self._sums = self._sums + sums
            self.steps += 1

    def temperature(self, entropy: float) -> float | None:
        """Return the temperature of a mean relative entropy; ``None`` before the first step."""
        return temperature_of(self._sums, entropy)

    def state(self) -> dict[str, Any]:
        """Return the state as a dict that can be written as JSON."""
        return {"steps": self.steps, "entropy_sums": self._sums.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Take a state that ``state`` returned.

        Raises:
            ValueError: The state has another form.
        """
        sums = np.array(state.get("entropy_sums", []), dtype=np.float64)
        if sums.shape != self._sums.shape or "steps" not in state:
            raise ValueError(
                f"The state of a calibration has 'steps' and {len(self._sums)} 'entropy_sums', but this one has "
                f"{sorted(state)} and {sums.size} sums. It was saved by another version."
            )
        self.steps, self._sums = int(state["steps"]), sums


def temperature_of(sums: NDArray[np.float64], entropy: float) -> float | None:
    """Return the temperature at which the mean relative entropy is ``entropy``; ``None`` if ``sums`` counts no row.

    The result is interpolated, and within the grid: 2e-4 to 4e3.
    """
    if not sums[0]:
        return None
    means = np.maximum.accumulate(sums[1:] / sums[0])  # rounding may break the order where entropies hardly differ
    return float(2.0 ** np.interp(entropy, means, np.log2(_GRID)))
