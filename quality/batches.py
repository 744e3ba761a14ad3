"""Batches of the study, made in three ways. All contenders train on the same batches in the same order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer
from torch.utils.data import BatchSampler, SequentialSampler

from examples.docstrings import Pair
from examples.student import mine_triplets
from quality.plan import Batching

Item = TypeVar("Item")

Batch = list[tuple[str, ...]]
"""Rows of anchor, positive and, with mined negatives, negative."""

# Number of pairs whose documents are the candidates for hard negatives.
_MINED_AMONG = 3_000


def pool(
    pairs: Sequence[Pair], batching: Batching, batch_size: int, batches: int, miner: SentenceTransformer
) -> list[Batch]:
    """Make batches of ``batch_size`` rows; no pair is in two of them.

    Args:
        pairs: Pairs to train on.
        batching: Way to make batches; see :class:`quality.plan.Regime`.
        batch_size: Rows of a batch.
        batches: Number of batches.
        miner: Embedding model that finds hard negatives.

    Raises:
        ValueError: There are too few pairs for this many batches.
    """
    draw = random.Random(0)
    laid: list[Batch]
    rows: list[tuple[str, ...]]
    if batching == "related":
        laid = [
            [(pair.summary, pair.body) for pair in neighbours]
            for _, package in groupby(sorted(pairs, key=lambda pair: pair.module), key=_package)
            for neighbours in _cut(list(package), batch_size)
        ]
        draw.shuffle(laid)
        laid = laid[:batches]
    else:
        drawn = list(pairs)
        draw.shuffle(drawn)
        if batching == "mined":
            # A fiftieth more than needed, because mining finds no negative for some pairs.
            wanted = batches * batch_size * 51 // 50 + 1
            triplets, _ = mine_triplets(drawn[:wanted], drawn[wanted:_MINED_AMONG], miner)
            rows = list(zip(*(triplets[column][:] for column in ("anchor", "positive", "negative")), strict=True))
        else:
            rows = [(pair.summary, pair.body) for pair in drawn]
        laid = _cut(rows, batch_size)[:batches]
    if len(laid) < batches:
        raise ValueError(f"{len(pairs)} pairs make {len(laid)} batches of {batch_size}, but {batches} are needed")
    return laid


def for_seed(laid: Sequence[Batch], steps: int, seed: int) -> Dataset:
    """Return the rows of a seed's ``steps`` batches as a data set for :func:`in_order`; no two seeds share a batch.

    Raises:
        ValueError: There are no batches for this seed.
    """
    chosen = laid[seed * steps : (seed + 1) * steps]
    if len(chosen) < steps:
        raise ValueError(
            f"{len(laid)} batches are enough for {len(laid) // steps} seeds of {steps}, not for seed {seed}"
        )
    rows = [row for batch in chosen for row in batch]
    return Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), zip(*rows, strict=True), strict=False)))


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Make a batch sampler that keeps the order of the rows; the ``batch_sampler`` of the training arguments."""
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def _cut(items: list[Item], size: int) -> list[list[Item]]:
    return [items[at : at + size] for at in range(0, len(items) - size + 1, size)]


def _package(pair: Pair) -> str:
    return pair.module.partition("/")[0]
