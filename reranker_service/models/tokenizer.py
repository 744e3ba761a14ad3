"""Tokenizers: loads a model's own fast tokenizer and makes it safe to share between threads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from tokenizers import Tokenizer, normalizers

from .spec import ModelSpec, UnsupportedModelError
from .tokens import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        path: The model's directory.
        trust_remote_code: Whether Python code in the directory may run.

    Raises:
        UnsupportedModelError: The directory holds no tokenizer, or none of the fast kind.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{path.name}: its tokenizer can't be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{path.name}: {type(tokenizer).__name__} is not a fast tokenizer; one that can be saved as tokenizer.json "
            "is needed"
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def plain_tokenizer(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy a model's fast tokenizer without truncation and padding, and with the model's own lower-casing.

    No call changes the state of the copy, so any number of threads may use it at once.
    """
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    if spec.lower_case and not _lower_cases(plain):
        parts = [normalizers.Lowercase()]
        plain.normalizer = normalizers.Sequence([*parts, plain.normalizer] if plain.normalizer else parts)
    return plain


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text, int32, without special tokens."""
    return [
        np.array(encoding.ids, dtype=np.int32)
        for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def text_span(owner: Sequence[int | None], text: int) -> slice:
    """Positions of a text's tokens.

    Args:
        owner: For each token the number of the text that it belongs to; ``None`` for special tokens.
        text: The number of the text.
    """
    start = owner.index(text)
    return slice(start, start + owner.count(text))


def special_tokens_around_a_text(tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """The special tokens that the tokenizer puts before and after a single text."""
    probe = tokenizer.encode("a")
    text = text_span(probe.sequence_ids, 0)
    ids = np.array(probe.ids, dtype=np.int32)
    return ids[: text.start], ids[text.stop :]


def _lower_cases(tokenizer: Tokenizer) -> bool:
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "Lowercase" or part.get("lowercase") for part in parts)
