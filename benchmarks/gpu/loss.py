"""Training step with the server and the trainer on one GPU: the loss beside the same training without a reranker."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.pairs import PairSource, training_texts, words
from benchmarks.gpu.shapes import Shape

_STEPS, _SKIPPED = 4, 2
_STUDENT = {"vocab_size": 30_522}  # BERT-base in all else
_TINY_STUDENT = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_TIMEOUT = 300.0


def measure(
    reranker: Shape, output: Path, *, batch: int, rehearsal: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """Train a model of BERT-base's shape in bfloat16 for a few steps, alone and with the loss; return the times.

    Args:
        reranker: Shape of the served model.
        output: Directory for logs.
        batch: Anchors of a step; each has one positive, and all pairs of a batch are scored.
        rehearsal: Whether the models are tiny.
        say: Prints one line of progress.
    """
    from datasets import Dataset  # type: ignore[import-untyped]
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, PrinterCallback

    from benchmarks.loss_prefetch import StepClock
    from examples.serving import reranker_server
    from loss_client import RerankerCachedGISTEmbedLoss, RerankerClient, RerankerDataCollator

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    source = words()
    texts = training_texts(source)
    mini_batch = 64 if on_gpu else 8
    with tempfile.TemporaryDirectory(prefix="reranker-loss-") as directory:
        served, student = Path(directory) / "served", Path(directory) / "student"
        tokenizer = shapes.build(
            shapes.tiny(reranker) if rehearsal else reranker,
            served,
            texts,
            torch.bfloat16 if on_gpu else torch.float32,
            device,
        )
        bert = shapes.build(shapes.tiny(shapes.SHAPES[0]), student, texts, torch.float32, device)
        config = BertConfig(**{**_STUDENT, **(_TINY_STUDENT if rehearsal else {})}, pad_token_id=bert.pad_token_id)
        BertModel(config, add_pooling_layer=False).save_pretrained(student)
        grid = PairSource(source, tokenizer, 128).grid(batch * (_STEPS + _SKIPPED + 1), batch * (_STEPS + _SKIPPED + 1))
        dataset = Dataset.from_dict({"anchor": list(grid.queries), "positive": list(grid.documents)})
        with (
            reranker_server(output / "loss.log", "torch", ["--model", str(served), "--cache-bytes", "0"]) as server,
            RerankerClient(server.wait_ready(), timeout=_TIMEOUT) as client,
        ):

            def train(with_reranker: bool) -> float:
                torch.manual_seed(0)
                transformer = Transformer(str(student), max_seq_length=128)
                width = transformer.get_embedding_dimension()
                model = SentenceTransformer(modules=[transformer, Pooling(width)], device=str(device))
                arguments = Arguments(
                    str(Path(directory) / "trainer"),
                    max_steps=_STEPS + _SKIPPED,
                    per_device_train_batch_size=batch,
                    learning_rate=1e-5,
                    bf16=on_gpu,
                    use_cpu=not on_gpu,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                )
                loss: Any = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch)
                collator = None
                if with_reranker:
                    loss = RerankerCachedGISTEmbedLoss(model, client, 0.05, mini_batch, timeout=_TIMEOUT)
                    collator = RerankerDataCollator.for_training(model, arguments, loss)
                clock = StepClock(_SKIPPED)
                clock.watch(loss)
                trainer = SentenceTransformerTrainer(
                    model, arguments, dataset, loss=loss, data_collator=collator, callbacks=[clock]
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                return clock.steps().seconds

            def score() -> float:
                began = time.perf_counter()
                client.stream_grid(grid.queries[:batch], grid.documents[:batch], timeout=_TIMEOUT).result()
                return time.perf_counter() - began

            alone, scoring, together = train(False), min(score() for _ in range(3)), train(True)
    record = {
        "reranker": reranker.name,
        "batch": batch,
        "train_seconds": alone,
        "score_seconds": scoring,
        "step_seconds": together,
        "step_over_sum": together / (alone + scoring),
        "step_over_longer": together / max(alone, scoring),
    }
    say(f"loss on one device: {record}")
    return record
