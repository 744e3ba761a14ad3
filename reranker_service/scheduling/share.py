"""Share: the part of the work that bulk work is given while interactive work waits too.

Interactive work overtakes bulk work. Without a share, bulk work would make no progress as long as interactive work
never ends. The share counts costs, such as tokens, in the same unit for both priorities.
"""

from __future__ import annotations


class BulkShare:
    """Decides when bulk work is due although interactive work waits.

    Bulk work is due once it is owed as much as its latest batch had cost. So a burst of interactive work shorter than
    ``(1 - share) / share`` of such a batch overtakes all bulk work, and a batch of interactive work waits for one batch
    of bulk work at most.
    """

    def __init__(self, share: float, least: float = 0.0) -> None:
        """Make a share of which nothing is owed.

        Args:
            share: Part of all costs that bulk work is given while both priorities wait, in [0, 1). 0: none.
            least: Least cost of a batch of interactive work: a small batch costs more time than its size tells.
        """
        self._owed_a_cost = share / (1 - share)
        self._least = least
        self._owed = 0.0
        self._latest = 0.0  # cost of the latest batch of bulk work

    def is_due(self) -> bool:
        """Whether bulk work comes next, if both priorities wait."""
        return self._owed > 0 and self._owed >= self._latest

    def give(self, cost: float, *, bulk: bool, contested: bool) -> None:
        """Count work that was begun.

        Args:
            cost: Its cost.
            bulk: Whether it is bulk work.
            contested: Whether work of the other priority waited. Work that nothing waited for is not counted, and
                cancels what is owed: bulk work has no claim to a time in which it did not wait.
        """
        if bulk:
            self._latest = cost
        if not contested:
            self._owed = min(self._owed, 0.0)
        elif bulk:
            self._owed -= cost
        else:
            self._owed += self._owed_a_cost * max(cost, self._least)
