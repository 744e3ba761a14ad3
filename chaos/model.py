"""Model files for the servers: a tokenizer of numbers, and weights that the engine never reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizer

from benchmarks.models import save
from chaos.scores import vocabulary

_POSITIONS = 64


def build(directory: Path) -> Path:
    """Write a cross-encoder whose tokenizer makes one token of each word from 0 to 999; returns ``directory``."""
    words = vocabulary()
    tokenizer = BertTokenizer(vocab=words, model_max_length=_POSITIONS)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=_POSITIONS,
        pad_token_id=0,
    )
    config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification
    return save(auto.from_config(config), tokenizer, directory)
