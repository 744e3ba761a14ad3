"""Callbacks for the trainer: the filter's statistics in the trainer's logs, and a schedule for the margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loss_client.filter.statistics import LossStatistics
from loss_client.loss import RerankerCachedGISTEmbedLoss

Losses = nn.Module | Mapping[str, nn.Module]
"""A loss, or several by dataset name, as a trainer takes them."""


class RerankerMetricsCallback(TrainerCallback):
    """Adds the filter's statistics since the last log to the trainer's logs.

    The names begin with ``reranker/``, and in evaluation with ``eval_reranker/``, where "eval" is the evaluation's
    prefix. If several processes train, the figures are those of the first process alone:

    - ``masked_share``: share of the negatives that the filter dropped.
    - ``outscored_positives``: share of the anchors for which a document with another text than the positive's scored
      above the positive.
    - ``positive_score``, ``negative_score``: mean score of the positives, and of the scored negatives.
    - ``pairs``: mean number of scored pairs in a step; ``cached_pairs`` and ``remembered_pairs``: of these, those from
      the server's cache and from the client's memory; ``skipped_pairs``: mean number of pairs that were not scored.
    - ``seconds_waited``: mean seconds that a step waited for scores.
    - ``unscored_share``: with ``candidates="mass"``, mean share of the softmax denominator without a score.
    - ``reconnects``, ``unfiltered_steps``: their numbers.

    A callback among a trainer's ``callbacks`` runs after those of TensorBoard, W&B and the like, which then do not log
    these figures. ``attach`` puts this callback before them::

        RerankerMetricsCallback(loss).attach(trainer)

    Args:
        loss: The trainer's loss or losses.
    """

    def __init__(self, loss: Losses) -> None:
        self._losses = reranker_losses(loss)
        self._seen = [LossStatistics() for _ in self._losses]
        self._training, self._evaluation = LossStatistics(), LossStatistics()

    def attach(self, trainer: Trainer) -> RerankerMetricsCallback:
        """Add this callback to a trainer before all others, and return the callback."""
        handler = trainer.callback_handler
        handler.add_callback(self)  # type: ignore[no-untyped-call]
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what was counted before the training."""
        self._collect(LossStatistics())

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a batch, with gradient accumulation."""
        self._collect(self._training)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the batch that completes a step."""
        self._collect(self._training)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a batch of an evaluation."""
        self._collect(self._evaluation)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to ``logs``, and begin to count anew."""
        if logs is None:
            return
        found: dict[str, float] = {}
        # Each evaluation logs its runtime under its own prefix; training logs "train_runtime" at its end.
        prefixes = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
        if prefixes and prefixes != ["train"]:
            found = {f"{prefixes[0]}_{name}": value for name, value in _metrics(self._evaluation).items()}
            self._evaluation.reset()
        elif self._training.steps:
            found = _metrics(self._training)
            self._training.reset()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # the trainer has copied ``logs`` to it already

    def _collect(self, total: LossStatistics) -> None:
        for number, loss in enumerate(self._losses):
            now, seen = replace(loss.statistics), self._seen[number]
            # Fewer steps than seen before: the statistics were reset in between.
            total.add(now.since(seen) if now.steps >= seen.steps else now)
            self._seen[number] = now


class RerankerMarginCallback(TrainerCallback):
    """Changes the margin during training.

    Example:
        A margin that grows from 0 to 0.2 in the first half of training::

            callbacks=[RerankerMarginCallback(loss, lambda progress: 0.2 * min(1.0, 2 * progress))]

    Args:
        loss: The trainer's loss or losses.
        schedule: Returns the margin, given the share of the training steps that are done, in [0, 1].
    """

    def __init__(self, loss: Losses, schedule: Callable[[float], float]) -> None:
        self._losses = reranker_losses(loss)
        self._schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the margin for the next step; scores that were asked for ahead do not depend on it."""
        margin = self._schedule(state.global_step / max(state.max_steps, 1))
        for loss in self._losses:
            loss.margin = margin


def reranker_losses(loss: Losses) -> list[RerankerCachedGISTEmbedLoss]:
    """Find the losses of this package in a trainer's loss or losses, also inside other losses.

    Raises:
        ValueError: None of them is or holds a ``RerankerCachedGISTEmbedLoss``.
    """
    parts = loss.values() if isinstance(loss, Mapping) else [loss]
    found = [inner for part in parts for inner in part.modules() if isinstance(inner, RerankerCachedGISTEmbedLoss)]
    if not found:
        raise ValueError("The callback needs a RerankerCachedGISTEmbedLoss, but the trainer's losses hold none.")
    return list(dict.fromkeys(found))


def _metrics(counts: LossStatistics) -> dict[str, float]:
    """Return log entries; means and shares are left out if their divisor is 0."""
    if not counts.steps:
        return {}
    values: dict[str, float] = {
        name: getattr(counts, name) / counts.steps
        for name in ("pairs", "cached_pairs", "remembered_pairs", "skipped_pairs", "seconds_waited")
    }
    values["masked_share"] = counts.masked_negatives / max(counts.negatives, 1)
    if counts.scored_anchors:
        values["outscored_positives"] = counts.outscored_positives / counts.scored_anchors
        values["positive_score"] = counts.positive_scores / counts.scored_anchors
        if counts.scored_negatives:
            values["negative_score"] = counts.negative_scores / counts.scored_negatives
        values["unscored_share"] = counts.unscored_share / counts.scored_anchors
    values["reconnects"] = counts.reconnects
    values["unfiltered_steps"] = counts.unfiltered_steps
    return {f"reranker/{name}": value for name, value in values.items()}
