"""UnfilteredWarning: warns of steps without scores, ever more rarely."""

from __future__ import annotations

import logging

from loss_client.filter.statistics import LossStatistics

logger = logging.getLogger(__name__)


class UnfilteredWarning:
    """Warns at the 1st, 2nd, 4th, 8th step without scores, and so on."""

    def __init__(self) -> None:
        self._next = 1

    def check(self, error: Exception, statistics: LossStatistics) -> None:
        """Warn if it is time to.

        Args:
            error: The error that ended the scoring of the last step.
            statistics: Counts that include this step.
        """
        count = statistics.unfiltered_steps
        if count < self._next:
            return
        self._next = 2 * count
        logger.warning(
            "No scores for %d of %d steps so far: these steps train without the filter (on_error='unfiltered' or "
            "max_wait). The next warning comes when their number has doubled. The last error: %s",
            *(count, statistics.steps, error),
        )
