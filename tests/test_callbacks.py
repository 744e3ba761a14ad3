"""Callbacks: the filter's figures reach the trainer's logs and other callbacks; the margin follows its schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from transformers import TrainerCallback

from loss_client import RerankerDataCollator, RerankerMarginCallback, RerankerMetricsCallback
from loss_client.client.errors import RerankerUnavailableError
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .training import MemoryScorer, dataset, random_scores, student

BATCH, STEPS = 4, 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(directory: Path) -> SentenceTransformer:
    return student(directory)


class Reporter(TrainerCallback):
    """Takes the place of TensorBoard's callback, and keeps copies of the logs that it gets."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:  # type: ignore[override]
        self.entries.append(dict(logs))


def make(model: Any, scorer: Any = None, **options: Any) -> RerankerCachedGISTEmbedLoss:
    scorer = scorer or MemoryScorer(random_scores())
    return RerankerCachedGISTEmbedLoss(model, scorer, **{"temperature": 0.05, "score_type": "raw", **options})


def trainer_for(
    directory: Path, model: SentenceTransformer, loss: Any, callbacks: list[TrainerCallback], **options: Any
) -> SentenceTransformerTrainer:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    args = SentenceTransformerTrainingArguments(str(directory / "output"), **{**defaults, **options})
    collator = RerankerDataCollator.for_training(model, args, loss)
    return SentenceTransformerTrainer(
        model, args, dataset(3, 24), dataset(3, 8), loss=loss, data_collator=collator, callbacks=callbacks
    )


def test_the_logs_hold_what_the_loss_counted(directory: Path, model: SentenceTransformer) -> None:
    loss, reporter = make(model), Reporter()
    trainer = trainer_for(directory, model, loss, [reporter])
    RerankerMetricsCallback(loss).attach(trainer)
    trainer.train()
    training = [entry for entry in reporter.entries if "loss" in entry]
    evaluation = [entry for entry in reporter.entries if "eval_loss" in entry]
    assert (len(training), len(evaluation)) == (2, 1)
    names = {name.removeprefix("reranker/") for name in training[0] if name.startswith("reranker/")}
    assert names == {
        "masked_fraction", "outscored_fraction", "positive_score", "negative_score", "pairs", "cached_pairs",
        "client_cached_pairs", "skipped_pairs", "wait_seconds", "servers", "unscored_fraction", "reconnects",
        "unfiltered_steps",
    }  # fmt: skip
    assert all(entry["reranker/pairs"] == BATCH * 2 * BATCH for entry in training)
    assert evaluation[0]["eval_reranker/pairs"] == BATCH * 2 * BATCH
    # Half of random scores are above another one.
    assert all(0.2 < entry["reranker/masked_fraction"] < 0.8 for entry in training)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["reranker/masked_fraction"] for entry in history] == [
        entry["reranker/masked_fraction"] for entry in training
    ]
    counts, parts = loss.statistics, [*training * 2, *evaluation * 2]
    assert counts.steps == len(parts) == 6
    masked = [value for part in parts for name, value in part.items() if name.endswith("reranker/masked_fraction")]
    assert np.mean(masked) == pytest.approx(counts.masked_negatives / counts.negatives)


def test_another_evaluation_logs_its_own_figures(directory: Path, model: SentenceTransformer) -> None:
    loss, reporter = make(model), Reporter()
    trainer = trainer_for(directory, model, loss, [reporter])
    RerankerMetricsCallback(loss).attach(trainer)
    trainer.train()
    trainer.evaluate(metric_key_prefix="test")
    entry = reporter.entries[-1]
    assert "test_loss" in entry
    assert entry["test_reranker/pairs"] == BATCH * 2 * BATCH
    assert not any(name.startswith(("reranker/", "eval_")) for name in entry)


def test_means_of_scores_are_those_of_the_scores(directory: Path, model: SentenceTransformer) -> None:
    data = dataset(3, 24).to_dict()
    positives = set(zip(data["anchor"], data["positive"], strict=True))

    def score(queries: Any, documents: Any) -> np.ndarray:
        return np.array([[0.75 if (q, d) in positives else 0.25 for d in documents] for q in queries], np.float32)

    for candidates in ("all", "nearest"):
        # Capped, so that some pairs are skipped whatever the weights of the model.
        cap = {"top_p": 0.999, "max_candidates": 2} if candidates == "nearest" else {}
        loss, reporter = make(model, MemoryScorer(score), candidates=candidates, **cap), Reporter()
        trainer = trainer_for(directory, model, loss, [reporter], eval_strategy="no")
        RerankerMetricsCallback(loss).attach(trainer)
        trainer.train()
        entry = reporter.entries[0]
        assert entry["reranker/positive_score"] == pytest.approx(0.75)
        assert entry["reranker/negative_score"] == pytest.approx(0.25)
        assert entry["reranker/outscored_fraction"] == 0
        assert entry["reranker/masked_fraction"] == 0
        assert (entry["reranker/skipped_pairs"] > 0) == (candidates == "nearest")


def test_steps_without_scores_are_counted(directory: Path, model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores(), RerankerUnavailableError("gone"))
    loss, reporter = make(model, scorer, on_error="unfiltered"), Reporter()
    trainer = trainer_for(directory, model, loss, [reporter], gradient_accumulation_steps=2, eval_strategy="no")
    RerankerMetricsCallback(loss).attach(trainer)
    trainer.train()
    assert reporter.entries[0]["reranker/unfiltered_steps"] == 4
    assert "reranker/positive_score" not in reporter.entries[0]


def test_given_among_the_callbacks_it_still_reaches_the_history(directory: Path, model: SentenceTransformer) -> None:
    loss = make(model)
    trainer = trainer_for(directory, model, MatryoshkaLoss(model, loss, [32, 8]), [RerankerMetricsCallback(loss)])
    trainer.train()
    assert sum("reranker/pairs" in entry for entry in trainer.state.log_history) == 2


def test_a_margin_follows_its_schedule(directory: Path, model: SentenceTransformer) -> None:
    loss, seen = make(model), []
    forward = loss.forward

    def recorded(*args: Any, **options: Any) -> Any:
        seen.append(loss.margin)
        return forward(*args, **options)

    loss.forward = recorded  # type: ignore[method-assign]
    schedule = RerankerMarginCallback({"one": loss}, lambda progress: 0.2 * progress)
    trainer_for(directory, model, loss, [schedule], eval_strategy="no").train()
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15])


def test_a_loss_without_a_filter_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="RerankerCachedGISTEmbedLoss"):
        RerankerMetricsCallback(MultipleNegativesRankingLoss(model))
