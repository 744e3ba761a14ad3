"""Training of a new student with one contender's loss."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from examples.contenders import Contender, FilterCounts
from loss_client import RerankerDataCollator, RerankerTrainer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a training, the same for all losses.

    Attributes:
        steps: Training steps.
        batch_size: Anchors of a step.
        learning_rate: Peak learning rate, reached after a tenth of the steps; then it falls to 0.
        seed: Seed of dropout, and of the order of the data unless a batch sampler sets the order.
        more: Further training arguments, such as ``batch_sampler``.
        steps_between_logs: Training steps between two logged losses. Default: a tenth of ``steps``.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    more: dict[str, Any] = field(default_factory=dict)
    steps_between_logs: int | None = None


@dataclass(frozen=True, slots=True)
class ProgressReport:
    """Figures of a training so far.

    Attributes:
        step: Number of finished steps.
        steps: Number of all steps.
        loss: Mean training loss since the last report.
        step_seconds: Median seconds of a step.
        masked_fraction: Share of the negatives that the reranker's filter masked since the last report, in [0, 1];
            ``None`` for a loss without a reranker.
        wait_seconds: Mean seconds that a step waited for scores since the last report; ``None`` likewise.
    """

    step: int
    steps: int
    loss: float
    step_seconds: float
    masked_fraction: float | None
    wait_seconds: float | None


@dataclass(frozen=True, slots=True)
class Trained:
    """Trained student with measurements of its training.

    Attributes:
        model: The student.
        step_seconds: Median seconds of a step.
        counts: Counts of the loss's filter.
        losses: (step, logged training loss).
    """

    model: SentenceTransformer
    step_seconds: float
    counts: FilterCounts
    losses: tuple[tuple[int, float], ...]


def train(
    contender: Contender,
    make_student: Callable[[], SentenceTransformer],
    dataset: Dataset,
    recipe: Recipe,
    output: Path,
    watch: Callable[[ProgressReport], object],
    prefetch: bool = True,
) -> Trained:
    """Train a student.

    Args:
        contender: Makes the loss.
        make_student: Makes the student; called after the random number generators are seeded.
        dataset: Columns of texts: anchor, positive and optionally negatives.
        recipe: Settings of the training.
        output: Output directory of the trainer.
        watch: Gets a report whenever the loss is logged.
        prefetch: Whether a reranker scores each batch while the batch before it trains.
    """
    set_seed(recipe.seed)
    model = make_student()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        dataloader_drop_last=True,
        learning_rate=recipe.learning_rate,
        warmup_steps=max(1, recipe.steps // 10),
        logging_steps=recipe.steps_between_logs or max(1, recipe.steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=recipe.seed,
        **recipe.more,
    )
    loss = contender.make_loss(model)
    progress = _Progress(watch)
    # With a loss that uses no reranker it is sentence-transformers' own trainer.
    trainer = RerankerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=loss,
        # A collator without the loss hands over the texts, and requests no scores.
        data_collator=None if prefetch else RerankerDataCollator.for_training(model, arguments),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Trained(model, progress.step_seconds, contender.read_counts(loss), tuple(progress.losses))


class _Progress(TrainerCallback):
    """Reports progress and measures the steps, from the end of one step to the end of the next."""

    def __init__(self, watch: Callable[[ProgressReport], object], clock: Callable[[], float] = time.monotonic) -> None:
        self.losses: list[tuple[int, float]] = []
        self._watch = watch
        self._clock = clock
        self._ends: list[float] = []

    @property
    def step_seconds(self) -> float:
        """Median seconds of the steps so far."""
        return statistics.median(after - before for before, after in zip(self._ends, self._ends[1:], strict=False))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ends.append(self._clock())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ends.append(self._clock())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = state.log_history[-1].get("loss")
        if loss is not None:
            self.losses.append((state.global_step, float(loss)))
            entry = state.log_history[-1]
            self._watch(
                ProgressReport(
                    state.global_step,
                    state.max_steps,
                    float(loss),
                    self.step_seconds,
                    entry.get("reranker/masked_fraction"),
                    entry.get("reranker/wait_seconds"),
                )
            )
