"""Tiny rerankers of many families with random weights, in the layouts in which they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from . import models

QWEN_TEMPLATE = (
    "{%- set task = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | "
    "default('Find the document that answers the query.', true) -%}"
    "<|im_start|>system\nJudge whether the Document meets the requirements.<|im_end|>\n<|im_start|>user\n"
    "<Instruct>: {{ task }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>{{ '\n\n' }}"  # a template's own last newline is not rendered
)
"""As Qwen3-Reranker's: special tokens after the document, and the instruction as a system message."""

PLAIN_TEMPLATE = (
    "Is the document relevant?\n"
    "Query: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "Document: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}\n"
    "Relevant:"
)
"""Without special tokens, so that the document's last characters share a token with the text after it."""

TRIMMED_TEMPLATE = PLAIN_TEMPLATE.replace("first }}", "first | trim }}")
"""Changes the texts, so that pairs cannot be joined from their tokens."""

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS: dict[str, dict[str, object]] = {
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "llama": {"num_key_value_heads": 1},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 64},
    "eurobert": {"num_key_value_heads": 1},  # no decoder, but with the tokenizer of one
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
}
"""Kinds of decoder, with what their configurations need beside the usual."""


def config(model_type: str, tokenizer: PreTrainedTokenizerBase, **more: object) -> Any:
    """The configuration of a tiny model; 256 tokens at most."""
    sizes = {} if model_type == "gpt2" else {**SIZES, "max_position_embeddings": 256}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    options = {**sizes, **DECODERS.get(model_type, {}), **ids, "initializer_range": 0.3, **more}
    return AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **options)


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Like Gemma's: BPE with "▁" for spaces whose tokens span words, and ``<bos>`` before each text."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1400, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    answers = [f"{one}" for one in ("Yes", "No", "yes", "no")] * 300
    tokenizer.train_from_iterator([*models.docstrings()[:400], *answers], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
    )


def tokenizer_of(model_type: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the kind that models of this type have."""
    return gemma_tokenizer() if model_type.startswith("gemma") else models.qwen_tokenizer()


def build_causal(directory: Path, model_type: str, **more: object) -> Path:
    """A bare causal language model, which nothing says to be a reranker."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(model_type)
    return models.save(AutoModelForCausalLM.from_config(config(model_type, tokenizer, **more)), tokenizer, directory)


def build_logit_score(
    directory: Path,
    model_type: str = "qwen3",
    template: str = QWEN_TEMPLATE,
    answers: tuple[str, str | None] = ("yes", "no"),
    **options: Any,
) -> Path:
    """A CrossEncoder of a causal language model with a LogitScore and a chat template, saved by the library.

    Args:
        options: Arguments of CrossEncoder, such as prompts.
    """
    plain = build_causal(directory / "plain", model_type)
    kwargs = {"chat_template": template, "model_max_length": 256}
    transformer = Transformer(str(plain), transformer_task="text-generation", processor_kwargs=kwargs)
    ids = [None if one is None else transformer.tokenizer.convert_tokens_to_ids(one) for one in answers]
    score = LogitScore(true_token_id=ids[0], false_token_id=ids[1])
    CrossEncoder(modules=[transformer, score], device="cpu", **options).save_pretrained(str(directory / "saved"))
    return directory / "saved"


def build_classifier(directory: Path, model_type: str, labels: int = 1, **more: object) -> Path:
    """A bare *ForSequenceClassification of a decoder."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(model_type)
    settings = config(model_type, tokenizer, num_labels=labels, **more)
    return models.save(AutoModelForSequenceClassification.from_config(settings), tokenizer, directory)


def build_decoder_chain(directory: Path) -> Path:
    """A CrossEncoder of a decoder whose score comes from pooling of its last token and a Dense."""
    torch.manual_seed(0)
    tokenizer = models.qwen_tokenizer()
    plain = models.save(AutoModel.from_config(config("qwen3", tokenizer)), tokenizer, directory / "plain")
    modules = [
        Transformer(str(plain), transformer_task="feature-extraction", processor_kwargs={"model_max_length": 256}),
        Pooling(SIZES["hidden_size"], pooling_mode="lasttoken"),
        Dense(SIZES["hidden_size"], 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(directory / "saved"))
    return directory / "saved"


def build_dense_bi_encoder(directory: Path) -> Path:
    """A SentenceTransformer of modules that the server has no rules of its own for."""
    torch.manual_seed(0)
    plain = models.build_bi_encoder(directory / "plain", prompts={"query": "query: ", "document": "text: "})
    base = SentenceTransformer(str(plain), device="cpu")
    modules = [base[0], Pooling(models.HIDDEN, pooling_mode=["cls", "mean"]), Dense(2 * models.HIDDEN, 24)]
    prompts = {"query": "query: ", "document": "text: "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save_pretrained(str(directory / "saved"))
    return directory / "saved"


def build_t5_bi_encoder(directory: Path) -> Path:
    """A SentenceTransformer of T5's encoder, as sentence-t5 is."""
    torch.manual_seed(0)
    tokenizer = models.wordpiece_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id}
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 48, "d_kv": 16}
    config = AutoConfig.for_model("t5", vocab_size=len(tokenizer), **sizes, **ids)
    plain = models.save(AutoModel.from_config(config), tokenizer, directory / "plain")
    modules = [Transformer(str(plain)), Pooling(32, pooling_mode="mean"), Dense(32, 24)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(directory / "saved"))
    return directory / "saved"


def build_bart_classifier(directory: Path) -> Path:
    """A classifier of encoder and decoder, which reads the last end token of its input."""
    torch.manual_seed(0)
    tokenizer = models.roberta_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes: dict[str, Any] = {"d_model": 32, "max_position_embeddings": 128, "init_std": 0.3, "num_labels": 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    config = AutoConfig.for_model("bart", vocab_size=len(tokenizer), **sizes, **ids)
    return models.save(AutoModelForSequenceClassification.from_config(config), tokenizer, directory)
