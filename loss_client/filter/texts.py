"""The texts of a training batch: taken from the features, and each distinct one kept once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

RAW_TEXT = "raw_text"
"""Key of a column's features under which the data collator puts the column's texts, a list of strings."""


@dataclass(frozen=True, slots=True)
class Interned:
    """Columns of texts with each distinct text once.

    Attributes:
        texts: The distinct texts in order of first appearance.
        ids: For each column the position of each of its texts in ``texts``, shape ``(rows of the column,)``.
    """

    texts: list[str]
    ids: list[NDArray[np.intp]]


def intern(columns: Sequence[Sequence[str]]) -> Interned:
    """Give each distinct text of all columns together one id.

    Order of first appearance matters: rows of scores are then needed in about the order in which they were asked for.
    """
    position: dict[str, int] = {}
    ids = [
        np.fromiter((position.setdefault(text, len(position)) for text in column), dtype=np.intp, count=len(column))
        for column in columns
    ]
    return Interned(list(position), ids)


def decode(features: dict[str, Any], tokenizer: Any) -> list[str]:
    """Turn one column's token ids back into texts, as well as that can be done.

    What the tokenizer dropped (letter case, accents, runs of spaces), what was cut off, and where a prompt ends cannot
    be known from the ids.

    Args:
        features: The column's features with ``input_ids``: padded, shape ``(batch, length)``, or flattened, shape
            ``(1, tokens)`` with sequence boundaries ``cu_seq_lens_q`` of shape ``(batch + 1,)``.
        tokenizer: The tokenizer that made them.

    Returns:
        One text for each sequence, without special tokens.

    Raises:
        ValueError: There are no token ids, or no tokenizer.
    """
    ids = features.get("input_ids")
    if not isinstance(ids, torch.Tensor) or tokenizer is None:
        raise ValueError(
            "The reranker needs texts, but a column of the batch has neither its raw texts nor token ids to decode. "
            "Give the trainer a RerankerDataCollator, and use columns of strings only."
        )
    bounds = features.get("cu_seq_lens_q")
    if bounds is not None:
        flat, cuts = ids.flatten().tolist(), bounds.tolist()
        sequences = [flat[begin:end] for begin, end in pairwise(cuts)]
    else:
        sequences = ids.tolist()
    return list(tokenizer.batch_decode(sequences, skip_special_tokens=True))


def tokenizer_of(model: Any, task: str | None) -> Any:
    """The tokenizer that a (possibly wrapped) SentenceTransformer uses for inputs of one task, or ``None``.

    Args:
        model: A SentenceTransformer, as it is or inside of DistributedDataParallel or ``torch.compile``'s module.
        task: The route of a Router model that the input takes; ``None`` without a Router.
    """
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    routes = getattr(model[0], "sub_modules", {})
    return getattr(routes[task][0] if task in routes else model[0], "tokenizer", None)
