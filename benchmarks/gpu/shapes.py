"""Shapes of rerankers, and models of these shapes with random weights and a tokenizer trained at run time.

Speed depends on shapes, not on values. The head is scaled so that raw scores have the spread of a real reranker's: the
errors of number formats are measured on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.models import QWEN_SPECIAL, byte_level_vocabulary, qwen_tokenizer

MAX_TOKENS = 512
_TRAINED_TOKENS = 8_192
_SPREAD = 3.0  # standard deviation of raw scores, about that of ms-marco-MiniLM-L6-v2

Family = Literal["bert", "modernbert", "xlm-roberta", "qwen3"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a reranker.

    Attributes:
        name: The real model's name.
        family: ``model_type`` of its configuration.
        config: Arguments of the configuration.
        pairs: Pairs that a fast GPU scores in a second or two; about the size of a measured grid.
    """

    name: str
    family: Family
    config: dict[str, Any]
    pairs: int


def _modernbert(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 50_368,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "classifier_pooling": "cls",
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 151_669,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    }


SHAPES = (
    Shape(
        "MiniLM-L6",
        "bert",
        {
            "vocab_size": 30_522,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
        },
        32_768,
    ),
    Shape("ettin-17m", "modernbert", _modernbert(256, 384, 7, 4), 32_768),
    Shape("ettin-150m", "modernbert", _modernbert(768, 1152, 22, 12), 8_192),
    Shape("ettin-400m", "modernbert", _modernbert(1024, 2624, 28, 16), 4_096),
    Shape(
        "bge-reranker-v2-m3",
        "xlm-roberta",
        {
            "vocab_size": 250_002,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 8194,
            "type_vocab_size": 1,
        },
        4_096,
    ),
    Shape("Qwen3-Reranker-0.6B", "qwen3", _qwen3(1024, 3072, 28, 16), 2_048),
    Shape("Qwen3-Reranker-4B", "qwen3", _qwen3(2560, 9728, 36, 32), 512),
)
"""Shapes by the size of the model; layers as ``config.json`` of the real models has them."""

_TINY = {
    "bert": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
    "modernbert": {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96},
    "xlm-roberta": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
    "qwen3": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 96,
    },
}


def tiny(shape: Shape) -> Shape:
    """A model of the same family that is fast on a CPU, to rehearse the benchmark."""
    return Shape(shape.name, shape.family, {**shape.config, **_TINY[shape.family], "vocab_size": _TRAINED_TOKENS}, 64)


def build(
    shape: Shape, directory: Path, texts: Sequence[str], dtype: torch.dtype, device: torch.device
) -> PreTrainedTokenizerFast:
    """Write a ``*ForSequenceClassification`` with one label; return its tokenizer.

    Args:
        shape: The shape.
        directory: Where to; created if it is missing.
        texts: Texts to train the tokenizer on, and to scale the head with.
        dtype: Number format of the saved weights.
        device: Device that makes the random weights.
    """
    tokenizer = _tokenizer(shape.family, texts)
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("pad", "bos", "eos", "cls", "sep")
        if getattr(tokenizer, f"{name}_token_id", None) is not None
    }
    positions = {"max_position_embeddings": MAX_TOKENS, **shape.config}
    # With the usual 0.02, encoders give nearly the same vector for every text, and rounding decides the rest.
    initial = 0.02 if shape.family == "qwen3" else min(0.1, 2 / shape.config["hidden_size"] ** 0.5)
    made_of = {**positions, **tokens, "num_labels": 1, "initializer_range": initial}
    config: Any = AutoConfig.for_model(shape.family, **made_of)
    if shape.family == "qwen3":
        config.reranker_family = "qwen3-reranker"  # its files alone do not say that it needs the template
    torch.manual_seed(0)
    auto: Any = AutoModelForSequenceClassification
    with torch.device(device):
        model = auto.from_config(config, dtype=torch.float32)
    _scale_head(model.eval(), tokenizer, texts)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def _scale_head(model: Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    inputs = tokenizer(
        list(texts[:32]), list(texts[32:64]), truncation=True, max_length=128, padding=True, return_tensors="pt"
    ).to(model.device)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 1]
    with torch.no_grad():
        logits = model(**inputs).logits[:, 0]
        linear[-1].weight.mul_(_SPREAD / logits.std())
        if linear[-1].bias is not None:
            linear[-1].bias.sub_(model(**inputs).logits[:, 0].mean())


def _tokenizer(family: Family, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    if family == "qwen3":
        made: Any = qwen_tokenizer(*byte_level_vocabulary(texts, _TRAINED_TOKENS - 8, QWEN_SPECIAL), MAX_TOKENS)
        return made
    if family == "xlm-roberta":
        special = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
        pair = "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0"
    else:
        special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        second = 1 if family == "bert" else 0
        pair = f"[CLS]:0 $A:0 [SEP]:0 $B:{second} [SEP]:{second}"
    names = list(special.values())
    if family == "bert":
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer()
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        raw.train_from_iterator(
            texts, trainers.WordPieceTrainer(vocab_size=_TRAINED_TOKENS, special_tokens=names, show_progress=False)
        )
    else:
        vocabulary, merges = byte_level_vocabulary(texts, _TRAINED_TOKENS, names)
        raw = Tokenizer(models.BPE(vocabulary, merges))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
    ids = [(name, raw.token_to_id(name)) for name in (special["cls_token"], special["sep_token"])]
    single = pair.split(" $B")[0].removesuffix(" </s>:0") if family == "xlm-roberta" else pair.split(" $B")[0]
    raw.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    segments = ["token_type_ids"] if family == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *segments, "attention_mask"],
        **special,
    )
