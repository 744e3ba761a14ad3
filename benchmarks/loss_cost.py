"""Benchmark of the loss's own cost: a training step with a server that answers at once, over one without a reranker.

The same texts are trained on with ``CachedMultipleNegativesRankingLoss``, with all pairs, and with 16 preselected pairs
an anchor, prefetch on. The preselector knows the embeddings of all texts, as from the second epoch on. The server runs
on the same cores, so that its processor time is a part of the step's time. The processor time of the training process
alone is the second figure: that of the loss and its client, less that of the training without a reranker, by pair of
the batch.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from numpy.typing import NDArray
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

Mode = Literal["alone", "all", "nearest"]

COLUMNS = (2, 5)
BATCHES = (1024, 4096)
_QUICK_BATCHES = (32,)
# Rounds at the largest batch, whose steps take tens of seconds.
_LARGEST_ROUNDS = 1
_SKIPPED_STEPS = 1  # the first step has no batch ahead
_STEPS = 2
_TOKENS = 16
_DIMENSIONS = 64
_MINI_BATCH = 64
_TEMPERATURE = 0.01
_PER_ANCHOR = 16
_PRESELECTOR_DIMENSIONS = 64
_MOST_MICROSECONDS = 1.0
_MOST_STEPS = 1.05


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
    """Measure steps of each mode for each batch size, with two and with five columns."""
    quick = bench.scale < 1
    batches, every = (_QUICK_BATCHES, COLUMNS[:1]) if quick else (BATCHES, COLUMNS)
    model = _tiny_student()
    found: dict[tuple[int, int, Mode], list[Cost]] = {}
    with (
        one_core_left(bench),
        tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory,
        bench.launcher.replies() as server,
        RerankerClient(address_of(server)) as client,
    ):
        for batch, columns in itertools.product(batches, every):
            # One batch more than the steps need, so that the last step also has a next batch to prefetch.
            dataset = _texts(bench, columns, batch * (_SKIPPED_STEPS + _STEPS + 1))
            preselector = _Embedded(dataset)
            for number in range(min(bench.rounds, _LARGEST_ROUNDS) if batch == max(BATCHES) else bench.rounds):
                for mode in get_args(Mode):
                    one = _train(model, client, dataset, batch, mode, Path(directory), preselector)
                    found.setdefault((batch, columns, mode), []).append(one)
                    bench.say(
                        f"round {number + 1}, batch {batch}, {columns} columns, {mode}: step {one.seconds:.2f} s, "
                        f"processor {one.processor:.2f} s"
                    )
    return list(figures(found))


def figures(found: Mapping[tuple[int, int, Mode], Sequence[Cost]]) -> Iterator[Figure]:
    """Yield the figures of costs by (batch, columns, mode), one a round."""
    for (batch, columns, mode), costs in found.items():
        if mode == "alone":
            continue
        alone, pairs = found[batch, columns, "alone"], batch * batch * (columns - 1)
        name = f"batch {batch}, {columns} columns, {mode}"
        ratios = [one.seconds / other.seconds for one, other in zip(costs, alone, strict=True)]
        target = _MOST_STEPS if mode == "nearest" else None
        yield Figure(f"{name}: step / without a reranker", Spread.of(ratios), "x", target, higher_is_better=False)
        ratios = [one.processor / other.processor for one, other in zip(costs, alone, strict=True)]
        yield Figure(f"{name}: processor time / without a reranker", Spread.of(ratios), "x", higher_is_better=False)
        own = [(one.processor - other.processor) / pairs * 1e6 for one, other in zip(costs, alone, strict=True)]
        target = _MOST_MICROSECONDS if mode == "all" else None
        yield Figure(f"{name}: processor time a pair", Spread.of(own), "us", target, False)


class _Embedded:
    """A preselector that has embedded every text of a data set: random vectors of unit length."""

    def __init__(self, dataset: Dataset) -> None:
        self._places = {text: place for place, text in enumerate(chain.from_iterable(dataset.to_dict().values()))}
        vectors = np.random.default_rng(0).normal(size=(len(self._places), _PRESELECTOR_DIMENSIONS))
        self._vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """Return the texts' embeddings, shape ``(texts, dimensions)``."""
        return self._vectors[[self._places[text] for text in texts]]


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
    model: SentenceTransformer,
    client: RerankerClient,
    dataset: Dataset,
    batch: int,
    mode: Mode,
    output: Path,
    preselector: _Embedded,
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
        chosen: dict[str, Any] = {"candidates": mode}
        if mode == "nearest":
            chosen |= {"preselector": preselector, "per_anchor": _PER_ANCHOR}
        loss = RerankerCachedGISTEmbedLoss(model, client, _TEMPERATURE, _MINI_BATCH, **chosen)
        collator = RerankerDataCollator.for_training(model, arguments, loss)
    clock = _Clock()
    trainer = SentenceTransformerTrainer(
        model, arguments, dataset, loss=loss, data_collator=collator, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.cost()
