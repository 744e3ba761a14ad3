"""EqualAnchors: positives that rows with the same anchor share. None of them is a negative of any of these rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EqualAnchors:
    """Positives of rows whose anchor occurs more than once.

    Args:
        anchors: Ids that are equal if and only if the anchors' texts are, shape ``(rows,)``.
        positives: Ids of the rows' positives, shape ``(rows,)``.
    """

    def __init__(self, anchors: NDArray[np.intp], positives: NDArray[np.intp]) -> None:
        self._group_of = np.full(len(anchors), -1, dtype=np.intp)  # -1: the row's anchor occurs once
        self._members: list[NDArray[np.intp]] = []
        self._positives: list[NDArray[np.intp]] = []
        order = np.argsort(anchors, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(anchors[order])) + 1):
            if len(members) > 1:
                self._group_of[members] = len(self._members)
                self._members.append(members)
                self._positives.append(np.unique(positives[members]))

    def mark(self, flags: NDArray[np.bool_], rows: NDArray[np.intp]) -> None:
        """Set in ``flags``, shape ``(len(rows), documents)``, the positives of the rows with the same anchor."""
        groups = self._group_of[rows]
        for line in np.flatnonzero(groups >= 0).tolist():
            flags[line, self._positives[groups[line]]] = True

    def holders(self, documents: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return where a document is the positive of a row with the same anchor as a row.

        Args:
            documents: Ids of documents, shape ``(documents,)``.

        Returns:
            Shape ``(documents, rows)``; false for rows whose anchor occurs once.
        """
        found = np.zeros((len(documents), len(self._group_of)), dtype=np.bool_)
        for members, positives in zip(self._members, self._positives, strict=True):
            found[np.ix_(np.isin(documents, positives), members)] = True
        return found
