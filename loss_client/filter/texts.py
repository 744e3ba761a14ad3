"""TextReader: takes the texts of a batch out of its features, or decodes them from token ids."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import torch

logger = logging.getLogger(__name__)

RAW_TEXT = "raw_text"
"""Key of a column's features under which the data collator puts the column's texts, a list of strings."""


class TextReader:
    """Takes the texts of a batch out of its features, and warns once if it has to decode them from token ids."""

    def __init__(self) -> None:
        self._warned = False

    def take(self, features: list[dict[str, Any]], model: Any) -> list[list[str]]:
        """Remove the texts from the features and return them by column.

        Args:
            features: The features by column; the texts of a column are under ``RAW_TEXT``. Without that they are
                decoded from ``input_ids``.
            model: The SentenceTransformer that the features are for; its tokenizer decodes.

        Raises:
            ValueError: There are fewer than two columns, columns differ in length, or a column has no texts.
        """
        if len(features) < 2:
            raise ValueError(
                f"The loss needs at least two columns of texts, anchor and positive, but the batch has {len(features)}."
            )
        columns = []
        for column in features:
            texts = column.pop(RAW_TEXT, None)
            if texts is None:
                texts = decode(column, tokenizer_of(model, column.get("task")))
                self._warn(texts)
            columns.append(list(texts))
        sizes = [len(column) for column in columns]
        if len(set(sizes)) > 1 or not sizes[0]:
            raise ValueError(
                f"Every column needs the same number of texts, at least one, but the columns have {sizes}."
            )
        return columns

    def _warn(self, texts: list[str]) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "The batch has no raw texts, so the reranker gets texts that are decoded from token ids. They lack what "
            "the tokenizer drops (letter case and accents with an uncased model, spaces around punctuation) and "
            "everything beyond the model's maximum length, and they include prompts. The first text that the "
            "reranker gets is %r. Use RerankerTrainer, or pass "
            "data_collator=RerankerDataCollator.for_training(model, args, loss) to the trainer.",
            texts[0][:200],
        )


def decode(features: dict[str, Any], tokenizer: Any) -> list[str]:
    """Decode one column's token ids into texts.

    The texts lack what the tokenizer dropped (letter case, accents, runs of spaces) and what was truncated, and they
    include the prompt.

    Args:
        features: The column's features with ``input_ids``: padded, shape ``(batch, length)``, or flattened, shape
            ``(1, tokens)`` with sequence boundaries ``cu_seq_lens_q`` of shape ``(batch + 1,)``.
        tokenizer: The tokenizer that made the ids.

    Returns:
        One text for each sequence, without special tokens.

    Raises:
        ValueError: There are no token ids, or there is no tokenizer.
    """
    ids = features.get("input_ids")
    if not isinstance(ids, torch.Tensor) or tokenizer is None:
        raise ValueError(
            "The reranker needs texts, but a column of the batch has neither its raw texts nor token ids to decode. "
            "Use RerankerTrainer, or give the trainer a RerankerDataCollator, and use columns of strings only."
        )
    bounds = features.get("cu_seq_lens_q")
    if bounds is not None:
        flat, cuts = ids.flatten().tolist(), bounds.tolist()
        sequences = [flat[begin:end] for begin, end in pairwise(cuts)]
    else:
        sequences = ids.tolist()
    return list(tokenizer.batch_decode(sequences, skip_special_tokens=True))


def tokenizer_of(model: Any, task: str | None) -> Any:
    """Return the tokenizer that a (possibly wrapped) SentenceTransformer uses for one task, or ``None``.

    Args:
        model: A SentenceTransformer, unwrapped or in DistributedDataParallel or ``torch.compile``'s module.
        task: The input's route in a model with a Router; ``None`` without a Router.
    """
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    routes = getattr(model[0], "sub_modules", {})
    return getattr(routes[task][0] if task in routes else model[0], "tokenizer", None)
