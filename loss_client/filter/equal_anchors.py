"""EqualAnchors: positives that rows with the same anchor share. None of them is a negative of any of these rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NONE = np.empty(0, dtype=np.intp)


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
        begins = np.flatnonzero(np.diff(anchors[order], prepend=-1))
        ends = np.append(begins[1:], len(order))
        for begin, end in zip(*(bounds[ends - begins > 1].tolist() for bounds in (begins, ends)), strict=True):
            members = order[begin:end]
            self._group_of[members] = len(self._members)
            self._members.append(members)
            self._positives.append(np.unique(positives[members]))

    def mark(self, flags: NDArray[np.bool_], rows: NDArray[np.intp]) -> None:
        """Set in ``flags``, shape ``(len(rows), documents)``, the positives of the rows with the same anchor."""
        groups = self._group_of[rows]
        for line in np.flatnonzero(groups >= 0).tolist():
            flags[line, self._positives[groups[line]]] = True

    def positives(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return (position in ``rows``, document) for every positive of the rows with the same anchor as one of them.

        Rows whose anchor occurs once are left out.
        """
        groups = self._group_of[rows]
        at = np.flatnonzero(groups >= 0)
        found = [self._positives[group] for group in groups[at].tolist()]
        return np.repeat(at, [len(documents) for documents in found]), np.concatenate([_NONE, *found])

    def holders(self, documents: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return (position in ``documents``, row) where a row has the same anchor as another row with this positive.

        Rows whose anchor occurs once are left out; of the others the row itself counts too.
        """
        positions, rows = [_NONE], [_NONE]
        for members, positives in zip(self._members, self._positives, strict=True):
            at = np.flatnonzero(np.isin(documents, positives))
            positions.append(np.repeat(at, len(members)))
            rows.append(np.tile(members, len(at)))
        return np.concatenate(positions), np.concatenate(rows)
