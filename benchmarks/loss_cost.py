"""Benchmark of the loss's own cost: a training step with a server that answers at once, over one without a reranker.

The same texts are trained on with ``CachedMultipleNegativesRankingLoss``, with all pairs and with candidates by mass,
prefetch on. The server runs on the same cores, so that its processor time is a part of the step's time. The processor
time of the training process alone is the second figure: that of the loss and its client, less that of the training
without a reranker, by pair of the batch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import (
    BertConfig,
    BertModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.loss_prefetch import one_core_left
from benchmarks.report import Figure
from benchmarks.rounds import Spread
from examples.student import load_student
from loss_client import RerankerCachedGISTEmbedLoss, RerankerClient, RerankerDataCollator

Mode = Literal["alone", "all", "mass"]

COLUMNS = (2, 5)
_BATCH = 1024
_QUICK_BATCH = 32
_SKIPPED_STEPS = 1  # the first step has no batch ahead
_STEPS = 2
_TOKENS = 16
_DIMENSIONS = 64
_MINI_BATCH = 64
_TEMPERATURE = 0.01
_MOST_MICROSECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Means over the steps of one training.

    Attributes:
        seconds: Seconds of a step.
        processor: Seconds of processor time of the training process, in a step.
    """

    seconds: float
    processor: float


class _Clock(TrainerCallback):
    """Reads both clocks at the end of each step."""

    def __init__(self) -> None:
        self._readings: list[tuple[float, float]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the clocks."""
        self._readings.append((time.perf_counter(), time.process_time()))

    def cost(self) -> Cost:
        """Return the means over the steps after the first ones."""
        first, last = self._readings[_SKIPPED_STEPS - 1], self._readings[-1]
        steps = len(self._readings) - _SKIPPED_STEPS
        return Cost((last[0] - first[0]) / steps, (last[1] - first[1]) / steps)


def cost_figures(bench: Bench) -> list[Figure]:
    """Measure steps of each mode with two and with five columns."""
    quick = bench.scale < 1
    batch, every = (_QUICK_BATCH, COLUMNS[:1]) if quick else (_BATCH, COLUMNS)
    model = _tiny_student()
    found: dict[tuple[int, Mode], list[Cost]] = {}
    with (
        one_core_left(bench),
        tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory,
        bench.launcher.replies() as server,
        RerankerClient(address_of(server)) as client,
    ):
        for columns in every:
            # One batch more than the steps need, so that the last step also has a next batch to prefetch.
            dataset = _texts(bench, columns, batch * (_SKIPPED_STEPS + _STEPS + 1))
            for number in range(bench.rounds):
                for mode in ("alone", "all", "mass"):
                    one = _train(model, client, dataset, batch, mode, Path(directory))
                    found.setdefault((columns, mode), []).append(one)
                    bench.say(
                        f"round {number + 1}, {columns} columns, {mode}: step {one.seconds:.2f} s, "
                        f"processor {one.processor:.2f} s"
                    )
    return list(figures(found, batch))


def figures(found: Mapping[tuple[int, Mode], Sequence[Cost]], batch: int) -> Iterator[Figure]:
    """Yield the figures of costs by (columns, mode), one a round."""
    for (columns, mode), costs in found.items():
        if mode == "alone":
            continue
        alone, pairs = found[columns, "alone"], batch * batch * (columns - 1)
        ratios = [one.seconds / other.seconds for one, other in zip(costs, alone, strict=True)]
        yield Figure(f"{columns} columns, {mode}: step / without a reranker", Spread.of(ratios), higher_is_better=False)
        own = [(one.processor - other.processor) / pairs * 1e6 for one, other in zip(costs, alone, strict=True)]
        target = _MOST_MICROSECONDS if mode == "all" else None
        yield Figure(f"{columns} columns, {mode}: processor time a pair", Spread.of(own), "us", target, False)


def _tiny_student() -> SentenceTransformer:
    """Make a model so small that the loss's own part of a step shows: one layer, random weights, a fixed embedding."""
    model = load_student(1)
    model.max_seq_length = _TOKENS
    first: Any = model[0]
    config = BertConfig(
        vocab_size=len(first.tokenizer),
        hidden_size=_DIMENSIONS,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=_DIMENSIONS,
    )
    first.model = BertModel(config, add_pooling_layer=False)  # type: ignore[no-untyped-call]
    # Each mini-batch would make a gradient of the whole table, which takes longer than all other work of the model.
    first.model.embeddings.requires_grad_(False)
    return model


def _texts(bench: Bench, columns: int, rows: int) -> Dataset:
    """Make rows of distinct texts, each with its row and column in front; bodies repeat after a while."""
    bodies = bench.corpus.texts()
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, columns - 1))]

    def body(row: int, column: int) -> str:
        # A positive has words of its anchor, so that a model without training finds it.
        found = bodies[(row * columns + max(column - 1, 0)) % len(bodies)]
        return found[30:100] if column == 1 else found[:70]

    return Dataset.from_dict(
        {name: [f"{row}.{column} {body(row, column)}" for row in range(rows)] for column, name in enumerate(names)}
    )


def _train(
    model: SentenceTransformer, client: RerankerClient, dataset: Dataset, batch: int, mode: Mode, output: Path
) -> Cost:
    arguments = SentenceTransformerTrainingArguments(
        str(output),
        max_steps=_SKIPPED_STEPS + _STEPS,
        per_device_train_batch_size=batch,
        optim="sgd",
        learning_rate=1e-6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    loss: Any
    collator: RerankerDataCollator | None = None
    if mode == "alone":
        loss = CachedMultipleNegativesRankingLoss(model, 1 / _TEMPERATURE, mini_batch_size=_MINI_BATCH)
    else:
        loss = RerankerCachedGISTEmbedLoss(model, client, _TEMPERATURE, _MINI_BATCH, candidates=mode)
        collator = RerankerDataCollator.for_training(model, arguments, loss)
    clock = _Clock()
    trainer = SentenceTransformerTrainer(
        model, arguments, dataset, loss=loss, data_collator=collator, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.cost()
