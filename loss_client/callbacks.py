"""Callbacks for the trainer: statistics of the filter in its logs, state of the losses in its checkpoints, a margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import distributed, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loss_client.filter.statistics import LossStatistics
from loss_client.loss import RerankerCachedGISTEmbedLoss

Losses = nn.Module | Mapping[str, nn.Module]
"""A loss, or several by dataset name, as a trainer takes them."""


class RerankerMetricsCallback(TrainerCallback):
    """Adds the filter's statistics since the last log to the trainer's logs.

    The names begin with ``reranker/``, and in evaluation with ``eval_reranker/``, where "eval" is the evaluation's
    prefix. If several ranks train, each rank logs the figures of all ranks; a step then means a step of one rank:

    - ``masked_fraction``: fraction of the negatives that the filter dropped.
    - ``outscored_fraction``: fraction of the anchors for which a document with another text than the positive's scored
      above the positive.
    - ``positive_score``, ``negative_score``: mean score of the positives, and of the scored negatives.
    - ``pairs``: mean number of scored pairs in a step; ``cached_pairs`` and ``client_cached_pairs``: of these, those
      from the server's cache and from the client's; ``skipped_pairs``: mean number of pairs that were not scored.
    - ``wait_seconds``: mean seconds that a step waited for scores.
    - ``servers``: mean number of servers that scored a step's pairs.
    - ``unscored_fraction``: mean fraction of an anchor's softmax denominator, after masking, that documents without a
      score hold.
    - ``per_anchor``: with a preselector, mean number of preselected pairs of an anchor.
    - ``missed_mask_fraction``: with a preselector, estimated fraction of all masks that the filter misses, because
      their pairs have no score. It rests on eight random pairs a step: look at its mean over many steps.
    - ``late_pairs``, ``late_choices``: if any, mean number of pairs whose scores did not arrive in time, in a step, and
      number of steps for which the preselector did not choose in time.
    - ``unscored_anchor_fraction``: if any, fraction of the anchors that the filter left as they are, because the score
      of their positive did not arrive.
    - ``distillation_loss``: with distillation, mean of the term, a KL divergence, before its weight.
    - ``guide_entropy``: with distillation, mean entropy of the guide's distributions, in nats.
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
        """Put this callback before all others of a trainer, and return the callback."""
        handler = trainer.callback_handler
        if self not in handler.callbacks:
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
        # Each evaluation logs its runtime under its own prefix; training logs "train_runtime" at its end.
        prefix = next((name.removesuffix("_runtime") for name in logs or () if name.endswith("_runtime")), None)
        # Other logs may be of one rank alone, which would wait for the others for ever.
        if logs is None or (prefix is None and "loss" not in logs):
            return
        if prefix in (None, "train"):
            found = _metrics(_sum_over_ranks(self._training, args.device))
            self._training.reset()
        else:
            counts = _sum_over_ranks(self._evaluation, args.device)
            found = {f"{prefix}_{name}": value for name, value in _metrics(counts).items()}
            self._evaluation.reset()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # the trainer has copied ``logs`` to it already

    def _collect(self, total: LossStatistics) -> None:
        for number, loss in enumerate(self._losses):
            now, seen = replace(loss.statistics), self._seen[number]
            # Fewer steps than seen before: the statistics were reset in between.
            total.add(now.since(seen) if now.steps >= seen.steps else now)
            self._seen[number] = now


@runtime_checkable
class Resumable(Protocol):
    """A loss with state that it sets in training, to be saved in checkpoints."""

    def resume_state(self) -> dict[str, Any]:
        """Return the state, a dict that can be written as JSON; empty if there is none."""

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue with a state that ``resume_state`` returned."""


class RerankerResumeCallback(TrainerCallback):
    """Saves the state of the losses in the trainer's checkpoints, and restores it when training resumes.

    Each rank restores the state from its copy of the checkpoint. A checkpoint without the state is no error.

    Args:
        loss: The trainer's loss or losses.
    """

    # An entry beside those of transformers' ``ExportableState`` callbacks. Those are restored only with an option that
    # is off by default, and by a new object of the class, which could not know the losses.
    _KEY = "RerankerLosses"

    def __init__(self, loss: Losses) -> None:
        self._losses = {name: each for name, each in find_reranker_losses(loss).items() if isinstance(each, Resumable)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state that the checkpoint holds, if training resumes."""
        saved = _saved_states(state).get(self._KEY, {}).get("attributes", {})
        for name, loss in self._losses.items():
            if saved.get(name):
                loss.load_resume_state(saved[name])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the present state where the next checkpoint takes it from."""
        if self._losses:
            states = {name: loss.resume_state() for name, loss in self._losses.items()}
            _saved_states(state)[self._KEY] = {"args": {}, "attributes": states}


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


def find_reranker_losses(loss: Losses) -> dict[str, RerankerCachedGISTEmbedLoss]:
    """Find the losses of this package in a trainer's loss or losses, also inside other losses.

    Returns:
        Each loss once, by its first place: the dataset's name, if there are several, and the path inside the loss.
    """
    found: dict[str, RerankerCachedGISTEmbedLoss] = {}
    for dataset, part in loss.items() if isinstance(loss, Mapping) else [("", loss)]:
        for place, inner in part.named_modules(prefix=dataset):
            if isinstance(inner, RerankerCachedGISTEmbedLoss) and inner not in found.values():
                found[place] = inner
    return found


def reranker_losses(loss: Losses) -> list[RerankerCachedGISTEmbedLoss]:
    """Find the losses of this package in a trainer's loss or losses, also inside other losses.

    Raises:
        ValueError: None of them is or holds a ``RerankerCachedGISTEmbedLoss``.
    """
    found = list(find_reranker_losses(loss).values())
    if not found:
        raise ValueError("The callback needs a RerankerCachedGISTEmbedLoss, but the trainer's losses hold none.")
    return found


def _saved_states(state: TrainerState) -> dict[str, Any]:
    """Return the part of a trainer's state that checkpoints keep for callbacks, by name."""
    states: Any = state.stateful_callbacks  # declared a list; a dict once the state exists
    assert isinstance(states, dict)
    return states


def _sum_over_ranks(counts: LossStatistics, device: torch.device) -> LossStatistics:
    """Sum counts over all ranks. Every rank has to call this at the same point of training."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts
    names = [field.name for field in fields(counts)]
    totals = torch.tensor([getattr(counts, name) for name in names], dtype=torch.float64, device=device)
    distributed.all_reduce(totals)
    return LossStatistics(**dict(zip(names, totals.tolist(), strict=True)))


def _metrics(counts: LossStatistics) -> dict[str, float]:
    """Return log entries; means and fractions are left out if their divisor is 0."""
    if not counts.steps:
        return {}
    values: dict[str, float] = {
        name: getattr(counts, name) / counts.steps
        for name in ("pairs", "cached_pairs", "client_cached_pairs", "skipped_pairs", "wait_seconds", "servers")
    }
    values["masked_fraction"] = counts.masked_negatives / max(counts.negatives, 1)
    if counts.scored_anchors:
        values["outscored_fraction"] = counts.outscored_positives / counts.scored_anchors
        values["positive_score"] = counts.positive_scores / counts.scored_anchors
        if counts.scored_negatives:
            values["negative_score"] = counts.negative_scores / counts.scored_negatives
        values["unscored_fraction"] = counts.unscored_fraction / counts.scored_anchors
    if counts.scored_anchors < counts.anchors:
        values["unscored_anchor_fraction"] = 1 - counts.scored_anchors / counts.anchors
    if counts.preselected_pairs:
        values["per_anchor"] = counts.preselected_pairs / counts.anchors
    if counts.probed_pairs:
        masks = counts.missed_masks + counts.masked_negatives
        values["missed_mask_fraction"] = counts.missed_masks / masks if masks else 0.0
    if counts.late_pairs:
        values["late_pairs"] = counts.late_pairs / counts.steps
    if counts.late_choices:
        values["late_choices"] = counts.late_choices
    if counts.distilled_anchors:
        values["distillation_loss"] = counts.distillation_loss / counts.distilled_anchors
        values["guide_entropy"] = counts.guide_entropy / counts.distilled_anchors
    values["reconnects"] = counts.reconnects
    values["unfiltered_steps"] = counts.unfiltered_steps
    return {f"reranker/{name}": value for name, value in values.items()}
