"""Prefetch: scoring begins in the collator, one batch ahead of training, and unused jobs are cancelled."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from loss_client.collator import RerankerDataCollator
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .training import (
    MemoryScorer,
    MemoryScores,
    assert_same_gradients,
    dataset,
    gradients,
    random_scores,
    student,
    texts,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(directory: Path) -> SentenceTransformer:
    return student(directory)


class Recorder(MemoryScorer):
    """Records the beginning of each job."""

    def __init__(self) -> None:
        super().__init__(random_scores())
        self.events: list[str] = []

    def stream_grid(self, *args: Any, **options: Any) -> MemoryScores:
        self.events.append("ask")
        return super().stream_grid(*args, **options)


def arguments(directory: Path, **options: Any) -> SentenceTransformerTrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return SentenceTransformerTrainingArguments(str(directory / "output"), **{**defaults, **options})


def make(model: Any, scorer: Any, **options: Any) -> RerankerCachedGISTEmbedLoss:
    return RerankerCachedGISTEmbedLoss(model, scorer, **{"temperature": 0.05, "score_type": "raw", **options})


def rows(columns: int = 3, count: int = 4) -> list[dict[str, str]]:
    return [dict(row) for row in dataset(columns, count)]


def batch_of(collated: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a collated batch as the trainer passes it to the loss."""
    names = [key.removesuffix("_input_ids") for key in collated if key.endswith("_input_ids")]
    return [
        {key.removeprefix(f"{name}_"): value for key, value in collated.items() if key.startswith(f"{name}_")}
        for name in names
    ]


def used(job: MemoryScores) -> bool:
    return bool(job.reads) and not job.cancelled


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_is_asked_for_before_the_one_before_it_trains(
    directory: Path, model: SentenceTransformer, accumulation: int
) -> None:
    scorer = Recorder()
    loss = make(model, scorer)
    forward = loss.forward

    def recorded(*args: Any, **options: Any) -> Any:
        scorer.events.append("train")
        return forward(*args, **options)

    loss.forward = recorded  # type: ignore[method-assign]
    args = arguments(directory, gradient_accumulation_steps=accumulation)
    collator = RerankerDataCollator.for_training(model, args, loss)
    SentenceTransformerTrainer(model, args, dataset(3, 24), loss=loss, data_collator=collator).train()
    steps = 3 * accumulation
    # At the beginning of each step the next batch, or the whole next group of batches, is already being scored.
    for step in range(steps - accumulation):
        position = [number for number, event in enumerate(scorer.events) if event == "train"][step]
        assert scorer.events[:position].count("ask") >= step + 2
    assert sum(used(job) for job in scorer.jobs) == steps
    del collator
    gc.collect()
    assert all(used(job) or job.cancelled for job in scorer.jobs)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("candidates", ["all", "nearest"])
def test_training_is_the_same_with_and_without(directory: Path, workers: int, candidates: str) -> None:
    weights = []
    for ahead in (False, True):
        model, scorer = student(directory), MemoryScorer(random_scores())
        loss = make(model, scorer, candidates=candidates, top_p=0.999)
        args = arguments(directory, dataloader_num_workers=workers, learning_rate=1e-3, seed=5)
        collator = RerankerDataCollator.for_training(model, args, loss if ahead else None)
        SentenceTransformerTrainer(model, args, dataset(3, 12), loss=loss, data_collator=collator).train()
        named = model.named_parameters()  # the pooler is initialized at random and not used
        weights.append({name: value.detach().clone() for name, value in named if "pooler" not in name})
        assert loss.statistics.steps == 3
        assert loss.statistics.pairs > 0
    assert_same_gradients(weights[1], weights[0])


def test_jobs_of_batches_that_are_never_trained_on_are_cancelled(directory: Path, model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer)
    args = arguments(directory, max_steps=2)
    trainer = SentenceTransformerTrainer(
        model, args, dataset(3, 24), loss=loss, data_collator=RerankerDataCollator.for_training(model, args, loss)
    )
    trainer.train()
    gc.collect()
    assert [used(job) for job in scorer.jobs] == [True, True, *[False] * (len(scorer.jobs) - 2)]
    assert len(scorer.jobs) > 2, "the loader runs ahead"
    assert all(job.cancelled for job in scorer.jobs[2:])


def test_resuming_and_evaluating_leave_nothing_behind(directory: Path, model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    for resume, steps in ((None, 2), (True, 4)):
        args = arguments(directory, max_steps=steps, **options)
        trainer = SentenceTransformerTrainer(
            model, args, dataset(3, 24), dataset(3, 8), loss=loss,
            data_collator=RerankerDataCollator.for_training(model, args, loss),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
    del trainer
    gc.collect()
    assert sum(used(job) for job in scorer.jobs) == loss.statistics.steps == 4 + 2 * 2
    assert all(used(job) or job.cancelled for job in scorer.jobs)


def test_a_job_serves_one_forward_and_rows_are_given_back(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, mini_batch_size=3)
    collator = RerankerDataCollator.for_training(model, loss=loss)
    batch = batch_of(collator(rows()))
    assert len(scorer.jobs) == 1
    loss(batch, None)
    assert len(scorer.jobs) == 1
    assert scorer.jobs[0].reads == scorer.jobs[0].released == [(0, 3), (3, 4)]
    loss(batch, None)  # the same batch again: its job is used up
    assert len(scorer.jobs) == 2


def test_the_loss_inside_of_another_loss_is_found(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    outer = MatryoshkaLoss(model, make(model, scorer), [32, 16])
    collator = RerankerDataCollator.for_training(model, loss=outer)
    outer(batch_of(collator(rows())), None).backward()
    assert len(scorer.jobs) == 1
    assert gradients(model)


def test_what_changed_since_is_asked_for_anew_but_a_margin_needs_no_new_scores(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer)
    collator = RerankerDataCollator.for_training(model, loss=loss)
    batch = batch_of(collator(rows()))
    loss.margin = 2.5  # every score is above the threshold
    loss(batch, None)
    assert len(scorer.jobs) == 1
    assert loss.statistics.masked_negatives == loss.statistics.negatives
    batch = batch_of(collator(rows()))
    loss.reranker_max_length = 64
    loss(batch, None)
    assert [job.cancelled for job in scorer.jobs] == [False, True, False]
    assert scorer.jobs[2].options["max_length"] == 64


def test_each_dataset_has_its_loss_and_its_instruction(directory: Path, model: SentenceTransformer) -> None:
    scorers = {name: MemoryScorer(random_scores()) for name in ("one", "two")}
    losses: dict[str, Any] = {name: make(model, each, instruction="by default") for name, each in scorers.items()}
    args = arguments(directory, max_steps=4)
    collator = RerankerDataCollator.for_training(model, args, losses, {"two": "Find the body"})
    data = DatasetDict({"one": dataset(2, 8), "two": dataset(3, 8)})
    SentenceTransformerTrainer(model, args, data, loss=losses, data_collator=collator).train()
    assert {job.options["instruction"] for job in scorers["one"].jobs} == {"by default"}
    assert {job.options["instruction"] for job in scorers["two"].jobs} == {"Find the body"}
    assert all(used(job) for scorer in scorers.values() for job in scorer.jobs[:2])


def test_instructions_by_dataset_need_datasets_with_names(model: SentenceTransformer) -> None:
    collator = RerankerDataCollator.for_training(model, instructions={"one": "Find it"})
    with pytest.raises(ValueError, match="does not name its dataset"):
        collator(rows())


def test_an_empty_instruction_is_an_instruction(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, instruction="by default")
    loss.begin(texts(2, 4), "")
    loss.begin(texts(2, 4))
    assert [job.options["instruction"] for job in scorer.jobs] == ["", "by default"]


def test_the_job_begins_before_the_texts_are_tokenized(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    collator = RerankerDataCollator.for_training(model, loss=make(model, scorer))
    jobs: list[int] = []
    inner = collator.preprocess_fn

    def preprocess(*args: Any, **kwargs: Any) -> Any:
        jobs.append(len(scorer.jobs))
        return inner(*args, **kwargs)

    collator.preprocess_fn = preprocess
    collator(rows())
    assert set(jobs) == {1}


def test_an_instruction_needs_no_prefetch(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer)
    collator = RerankerDataCollator.for_training(model, instructions={"one": "Find it"})
    batch = batch_of(collator([{"dataset_name": "one", **row} for row in rows()]))
    assert not scorer.jobs
    loss(batch, None)
    assert [job.options["instruction"] for job in scorer.jobs] == ["Find it"]


def test_a_batch_from_another_process_begins_where_it_arrives(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    collator = RerankerDataCollator.for_training(model, loss=make(model, scorer))
    ticket = batch_of(collator(rows()))[0]["reranker_ticket"]
    sent = pickle.dumps(ticket)
    del ticket
    gc.collect()
    assert [job.cancelled for job in scorer.jobs] == [True]
    arrived = pickle.loads(sent)
    assert [job.cancelled for job in scorer.jobs] == [True, False]
    assert scorer.jobs[0].documents == scorer.jobs[1].documents
    del arrived
    gc.collect()
    assert [job.cancelled for job in scorer.jobs] == [True, True]
