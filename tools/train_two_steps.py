"""Two training steps with a tiny model against a server, as one JSON object: for an environment with the train extra.

python tools/train_two_steps.py ADDRESS
"""

from __future__ import annotations

import json
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer


def tiny_model(folder: str) -> SentenceTransformer:
    """Make a BERT of one layer with random weights that reads single characters; its files are in ``folder``."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {
        token: number for number, token in enumerate([*special, *string.ascii_lowercase, *string.punctuation])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    bert: Any = BertModel
    bert(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def main(address: str) -> None:
    """Train with the reranker at this address, and print the losses of the steps and the filter's metrics."""
    rows = {
        "anchor": ["read a file", "cosine of a number", "parse a date", "open a file"],
        "positive": ["Open file and return a stream.", "Return cos(x).", "Date from a string.", "Open file to read."],
    }
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(str(Path(folder) / "model"))
        arguments = SentenceTransformerTrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        loss = RerankerCachedGISTEmbedLoss(model, address)
        trainer = RerankerTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=loss)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"losses": [entry["loss"] for entry in logs], "metrics": sorted(set().union(*logs))}))


if __name__ == "__main__":
    main(sys.argv[1])
