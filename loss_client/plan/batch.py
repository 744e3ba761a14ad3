"""Batch: sizes of one training step, and the pairs that follow from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batch:
    """Sizes of one training step.

    Attributes:
        rows: Rows of the batch of one rank.
        columns: Columns: the anchor, its positive, and any mined negatives; 2 or more.
        ranks: Training processes. Each has a batch of its own; all share the servers.
        gather: Whether the documents of all ranks are negatives of each anchor (``gather_across_devices``).

    Raises:
        ValueError: A number is out of range.
    """

    rows: int
    columns: int
    ranks: int = 1
    gather: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("columns", 2), ("ranks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be {least} or more")

    @property
    def anchors(self) -> int:
        """Anchors of a step, of all ranks together."""
        return self.rows * self.ranks

    @property
    def own(self) -> int:
        """Pairs of all anchors with the documents of their own rows."""
        return self.anchors * (self.columns - 1)

    @property
    def documents(self) -> int:
        """Documents that one anchor is compared with, if all texts differ."""
        return self.rows * (self.columns - 1) * (self.ranks if self.gather else 1)

    @property
    def pairs(self) -> int:
        """Pairs of all anchors with all their documents."""
        return self.anchors * self.documents

    @property
    def texts(self) -> int:
        """Texts that all ranks send in a step, each text once a rank."""
        return self.anchors + self.ranks * self.documents
