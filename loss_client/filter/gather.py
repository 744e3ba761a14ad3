"""Gathering: texts, embeddings and masks of all ranks of a distributed run.

Results are in rank order: row i of rank r is row ``sum(sizes[:r]) + i`` of all rows. Ranks may have different numbers
of rows, as in the last batch of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from sentence_transformers.util import all_gather_with_grad, get_rank, get_world_size
from torch import Tensor

from loss_client.filter.ahead import Batch, Columns, announcements


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions of each rank's rows among the rows of all ranks.

    Attributes:
        sizes: Number of rows of each rank, in rank order; this process's alone if nothing is gathered.
        rank: Position of this process in ``sizes``.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def offset(self) -> int:
        """Position of this rank's first row among all rows."""
        return sum(self.sizes[: self.rank])

    @property
    def mean_size(self) -> float:
        """Mean number of rows of a rank; this rank's own number if nothing is gathered."""
        return sum(self.sizes) / len(self.sizes)

    def own(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Return the numbers of some local rows among the rows of all ranks, shape ``(end - begin,)``."""
        return torch.arange(begin, end, device=device) + self.offset


def gather_columns(present: Batch, following: Batch | None = None) -> tuple[list[list[str]], Rows, list[list[str]]]:
    """Return the texts of all ranks.

    Args:
        present: This rank's batch, whose columns all have one length.
        following: The next batch of this rank, if it is known.

    Returns:
        The columns with the texts of all ranks one after the other; the positions of each rank's rows; and the columns
        of the next batches, of those ranks that know theirs and have as many columns there as this rank. Without a
        next batch of this rank there are no such columns.

    Raises:
        ValueError: The ranks have different numbers of columns.
    """
    if present.columns is None:
        raise ValueError("the batch has no texts")
    if get_world_size() == 1:
        return _joined([present.columns]), Rows((len(present.columns[0]),), 0), []
    announced = announcements()
    messages = _gather_objects(announced.message(get_rank(), present, following))
    gathered = announced.take(messages)
    counts = [len(rank_columns) for rank_columns in gathered]
    if len(set(counts)) > 1:
        raise ValueError(
            f"gather_across_devices needs batches with the same columns on every rank, but the ranks have {counts} "
            "columns."
        )
    rows = Rows(tuple(len(rank_columns[0]) for rank_columns in gathered), get_rank())
    ahead: list[Columns] = []
    if following is not None and following.columns is not None:
        known = [message.following.columns for message in messages if message.following is not None]
        ahead = [columns for columns in known if len(columns) == len(following.columns)]
    return _joined(gathered), rows, _joined(ahead)


def _joined(batches: Sequence[Columns]) -> list[list[str]]:
    """Return the columns of several batches, the texts of each column one after the other."""
    return [list(chain.from_iterable(parts)) for parts in zip(*batches, strict=True)]


def gather_embeddings(embeddings: Tensor, rows: Rows) -> Tensor:
    """Return the embeddings of all ranks; the gradient of each row flows back to the row's own rank.

    Args:
        embeddings: This rank's embeddings, shape ``(rows.sizes[rows.rank], dim)``.
        rows: Positions of each rank's rows.

    Returns:
        Shape ``(sum(rows.sizes), dim)``; ``embeddings`` itself if nothing is gathered.
    """
    if len(rows.sizes) == 1:
        return embeddings
    # all_gather needs the same shape on every rank.
    longest = max(rows.sizes)
    padded = torch.nn.functional.pad(embeddings, (0, 0, 0, longest - len(embeddings)))
    gathered: Tensor = all_gather_with_grad(padded)  # (ranks * longest, dim)
    if all(size == longest for size in rows.sizes):
        return gathered
    parts = torch.split(gathered, longest)
    return torch.cat([part[:size] for part, size in zip(parts, rows.sizes, strict=True)])


def gather_flags(flags: NDArray[np.bool_], rows: Rows) -> NDArray[np.bool_]:
    """Return the rows of a matrix of flags from all ranks.

    Args:
        flags: This rank's rows, shape ``(rows.sizes[rows.rank], columns)``.
        rows: Positions of each rank's rows.

    Returns:
        Shape ``(sum(rows.sizes), columns)``; ``flags`` itself if nothing is gathered.
    """
    if len(rows.sizes) == 1:
        return flags
    packed = _gather_objects(np.packbits(flags, axis=1))
    return np.unpackbits(np.concatenate(packed), axis=1, count=flags.shape[1]).astype(np.bool_)


def sum_over_ranks(values: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Return the sum of each value over all ranks.

    Args:
        values: This rank's values.
        device: Device of this rank's model, on which the backend can communicate.
    """
    if get_world_size() == 1:
        return values
    total = torch.from_numpy(values).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def _gather_objects(value: Any) -> list[Any]:
    """Gather one picklable object of each rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
