"""Tiny models of every kind that the server knows, with random weights and freshly trained tokenizers, without a hub.

Each builder writes one model into a directory and returns that directory; equal seeds give equal models. Weights are
drawn with a large deviation, so that scores spread and a wrong input shows.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import Unigram, WordPiece
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

from benchmarks import models as builders
from benchmarks.models import QWEN_SPECIAL, DecoderShape, all_minilm, qwen3_config, save

__all__ = ["QWEN_SPECIAL", "all_minilm"]

HIDDEN = 64  # two heads of 32: the smallest that vLLM computes on a CPU
LAYERS = 2
HEADS = 2
POSITIONS = 128
MODULES = ("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "fractions", "json", "logging")
FOREIGN = [
    "Où est la bibliothèque? Ça dépend de l'été.",
    "Größe, Maß und Übermut – “Anführungszeichen” … 100 %",
    "東京は日本の首都です。人口は約1400万人。",
    "Москва — столица России, основана в 1147 году.",
    "नमस्ते दुनिया, 😀 emoji 👩‍👩‍👧 and e\u0301 combining",
]


@cache
def docstrings() -> tuple[str, ...]:
    """Real English text: the docstrings of a few standard modules, and some lines in other scripts."""
    found: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for _, member in [(name, module), *sorted(inspect.getmembers(module), key=lambda item: item[0])]:
            members = [member, *vars(member).values()] if inspect.isclass(member) else [member]
            for item in members:
                text = getattr(item, "__doc__", None)
                if isinstance(text, str) and len(text) > 20:
                    found[inspect.cleandoc(text)] = None
    return (*found, *FOREIGN * 5)


def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight anew, biases and norms included, so that each of them matters to the score."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                # Word embeddings are larger than position embeddings, so that scores of different texts differ.
                parameter.copy_((1.0 if "word_embeddings" in name else 0.05 if name.endswith("bias") else 0.2) * noise)


@cache
def wordpiece_vocabulary() -> dict[str, int]:
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        docstrings(), trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    )
    return tokenizer.get_vocab(with_added_tokens=True)


def wordpiece_tokenizer() -> PreTrainedTokenizerBase:
    """Like BERT's: lower-casing WordPiece, ``[CLS] A [SEP] B [SEP]`` with token types 0 and 1."""
    return BertTokenizer(vocab=dict(wordpiece_vocabulary()), model_max_length=POSITIONS)


@cache
def unigram_vocabulary() -> list[tuple[str, float]]:
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        docstrings(),
        trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]] + [("<mask>", 0.0)]


def unigram_tokenizer() -> PreTrainedTokenizerBase:
    """Like XLM-RoBERTa's: Unigram with "▁" for spaces, ``<s> A </s></s> B </s>``, no token types."""
    tokenizer = XLMRobertaTokenizer(vocab=list(unigram_vocabulary()), model_max_length=POSITIONS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" {2,}", " ")]
    )
    return tokenizer


@cache
def byte_level_vocabulary(special: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    return builders.byte_level_vocabulary(docstrings(), 1000, special)


def roberta_tokenizer() -> PreTrainedTokenizerBase:
    """Like RoBERTa's: byte-level BPE, ``<s> A </s></s> B </s>``, no token types."""
    vocabulary, merges = byte_level_vocabulary(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return RobertaTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=POSITIONS)


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Like Qwen3's, trained on the docstrings."""
    return builders.qwen_tokenizer(*byte_level_vocabulary(tuple(QWEN_SPECIAL)), max_length=4096)


def _encoder_config(tokenizer: PreTrainedTokenizerBase, **more: object) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": tokenizer.pad_token_id,
        "num_labels": 1,
        **more,
    }


def build_bert_cross_encoder(directory: Path, seed: int = 0) -> Path:
    """BERT with one label and a WordPiece tokenizer; 128 tokens at most."""
    tokenizer = wordpiece_tokenizer()
    model = BertForSequenceClassification(BertConfig(**_encoder_config(tokenizer)))
    _randomize(model, seed)
    return save(model, tokenizer, directory)


def build_xlm_roberta_cross_encoder(directory: Path, seed: int = 0) -> Path:
    """XLM-RoBERTa with one label and a Unigram tokenizer; 128 tokens at most (130 positions, two of them unused)."""
    tokenizer = unigram_tokenizer()
    config = _encoder_config(tokenizer, max_position_embeddings=POSITIONS + 2, type_vocab_size=1)
    config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig(**config))
    _randomize(model, seed)
    return save(model, tokenizer, directory)


def build_roberta_cross_encoder(directory: Path, seed: int = 0) -> Path:
    """RoBERTa with one label and a byte-level BPE tokenizer; 128 tokens at most."""
    tokenizer = roberta_tokenizer()
    config = _encoder_config(tokenizer, max_position_embeddings=POSITIONS + 2, type_vocab_size=1)
    config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = RobertaForSequenceClassification(RobertaConfig(**config))
    _randomize(model, seed)
    return save(model, tokenizer, directory)


OTHER_ENCODERS: dict[str, dict[str, object]] = {
    "albert": {"embedding_size": HIDDEN},
    "deberta": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * HIDDEN},
    "electra": {"embedding_size": HIDDEN},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2},
}
"""More kinds of encoder, with what their configurations need beside the usual."""


def build_other_cross_encoder(directory: Path, model_type: str, seed: int = 0) -> Path:
    """A cross-encoder of one of ``OTHER_ENCODERS`` with a WordPiece tokenizer; 128 tokens at most."""
    tokenizer = wordpiece_tokenizer()
    config = AutoConfig.for_model(model_type, **_encoder_config(tokenizer, **OTHER_ENCODERS[model_type]))
    model = AutoModelForSequenceClassification.from_config(config)
    _randomize(model, seed)
    if model_type in ("distilbert", "modernbert", "mpnet"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return save(model, tokenizer, directory)


def _qwen3(seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    tokenizer = qwen_tokenizer()
    # As in the real checkpoints, more rows than tokens.
    shape = DecoderShape(LAYERS, HIDDEN, HEADS, 1, 32, 2 * HIDDEN, len(tokenizer) + 7, torch.float32)
    model = Qwen3ForCausalLM(qwen3_config(tokenizer, shape, positions=1024))
    _randomize(model, seed)
    return model, tokenizer


def build_qwen3_reranker(directory: Path, seed: int = 0) -> Path:
    """Qwen3-Reranker in its original layout: a causal model with tied embeddings; 1,024 tokens at most."""
    model, tokenizer = _qwen3(seed)
    return save(model, tokenizer, directory)


def build_qwen3_reranker_converted(directory: Path, seed: int = 0) -> Path:
    """The same model as a sequence classifier of one label, whose weight is the rows of "yes" minus "no"."""
    causal, tokenizer = _qwen3(seed)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    config = Qwen3Config(**{**causal.config.to_dict(), "num_labels": 1})
    model = Qwen3ForSequenceClassification(config)
    model.model.load_state_dict(causal.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_((causal.lm_head.weight[yes] - causal.lm_head.weight[no])[None])
    return save(model, tokenizer, directory)


def build_bi_encoder(
    directory: Path,
    seed: int = 0,
    pooling: str = "mean",
    prompts: dict[str, str] | None = None,
    normalize: bool = True,
    lower_case: bool = False,
    max_seq_length: int = 64,
) -> Path:
    """BERT with pooling in sentence-transformers' layout.

    Args:
        pooling: "mean", "cls", "lasttoken" or "max".
        prompts: Name to prompt, such as ``{"query": "query: ", "document": ""}``.
    """
    tokenizer = wordpiece_tokenizer()
    model = BertModel(BertConfig(**_encoder_config(tokenizer)), add_pooling_layer=False)
    _randomize(model, seed)
    save(model, tokenizer, directory)
    kinds = ["Transformer", "Pooling", "Normalize"][: 3 if normalize else 2]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    key = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken", "max": "max_tokens"}[pooling]
    pooling_config = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens")}
    files: dict[str, object] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": lower_case},
        "config_sentence_transformers.json": {"prompts": prompts or {}, "default_prompt_name": None},
        "1_Pooling/config.json": {
            "word_embedding_dimension": HIDDEN,
            **pooling_config,
            f"pooling_mode_{key}": True,
        },
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))
    if normalize:
        (directory / "2_Normalize").mkdir(exist_ok=True)
    return directory


def summary_and_body() -> Iterator[tuple[str, str]]:
    """Real pairs: the first line of a docstring with the rest of it."""
    for text in docstrings():
        summary, _, body = text.partition("\n")
        if body.strip():
            yield summary.strip(), body.strip()
