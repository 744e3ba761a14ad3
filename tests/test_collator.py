"""RerankerDataCollator: raw texts reach the loss in real training runs, and the rest of the batch is unchanged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Router

from loss_client.collator import RerankerDataCollator
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .training import MemoryScorer, cosines_of, dataset, guide, random_scores, student

PROMPTS = {"anchor": "query: ", "positive": "document: "}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(directory: Path) -> SentenceTransformer:
    return student(directory)


def arguments(directory: Path, **options: Any) -> SentenceTransformerTrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return SentenceTransformerTrainingArguments(str(directory / "output"), **{**defaults, **options})


def train(
    model: SentenceTransformer, args: SentenceTransformerTrainingArguments, data: Any, loss: Any, **options: Any
) -> SentenceTransformerTrainer:
    collator = RerankerDataCollator.for_training(model, args)
    trainer = SentenceTransformerTrainer(model, args, data, loss=loss, data_collator=collator, **options)
    trainer.train()
    return trainer


def test_adds_the_texts_and_changes_nothing_else(model: SentenceTransformer) -> None:
    rows = [{"dataset_name": "one", "anchor": "Größe", "positive": "Maß", "label": 1} for _ in range(2)]
    options: dict[str, Any] = {"preprocess_fn": model.preprocess, "prompts": PROMPTS}
    expected, found = SentenceTransformerDataCollator(**options)(rows), RerankerDataCollator(**options)(rows)
    assert found.pop("anchor_raw_text") == ["Größe", "Größe"]
    assert found.pop("positive_raw_text") == ["Maß", "Maß"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def test_nothing_to_collate(model: SentenceTransformer) -> None:
    assert RerankerDataCollator.for_training(model)([]) == {}


@pytest.mark.parametrize("value", [3, None, ["a", "list"], b"bytes"])
def test_columns_that_are_no_text_are_refused(model: SentenceTransformer, value: Any) -> None:
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": value}]
    with pytest.raises(TypeError, match=rf"'positive' holds a {type(value).__name__} in row 1"):
        RerankerDataCollator.for_training(model)(rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_run_sends_the_datasets_own_texts(directory: Path, model: SentenceTransformer, workers: int) -> None:
    data = dataset(3, 24)
    scorer = MemoryScorer(cosines_of(guide(directory)))
    loss = RerankerCachedGISTEmbedLoss(model, scorer, temperature=0.05, mini_batch_size=3, score_type="raw")
    args = arguments(directory, gradient_accumulation_steps=2, dataloader_num_workers=workers, prompts=PROMPTS)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = train(model, args, data, loss)
    assert len(scorer.jobs) == 6
    columns = data.to_dict()
    rows = {anchor: row for row, anchor in enumerate(columns["anchor"])}
    for job in scorer.jobs:
        wanted = [rows[query] for query in job.queries]
        names = ("positive", "negative_1")
        assert job.documents == [columns[name][row] for name in names for row in wanted]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(value) for value in losses)
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())


def test_training_lowers_the_loss(directory: Path, model: SentenceTransformer) -> None:
    data = dataset(2, 8)
    loss = RerankerCachedGISTEmbedLoss(
        model, MemoryScorer(cosines_of(guide(directory))), temperature=0.1, score_type="raw"
    )
    args = arguments(directory, max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2)
    history = train(model, args, data, loss).state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_evaluation_and_several_datasets(directory: Path, model: SentenceTransformer) -> None:
    parts = DatasetDict({"one": dataset(2, 8), "two": dataset(3, 8)})
    scorers = {name: MemoryScorer(random_scores()) for name in parts}
    losses = {name: RerankerCachedGISTEmbedLoss(model, scorer) for name, scorer in scorers.items()}
    prompts = {"one": {"anchor": "first: "}, "two": {"anchor": "second: "}}
    args = arguments(directory, max_steps=4, prompts=prompts)
    trainer = train(model, args, parts, losses, eval_dataset=DatasetDict({"one": dataset(2, 4)}))
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_one_loss"])
    assert [job.shape for job in scorers["one"].jobs] == [(4, 4)] * 3
    assert [job.shape for job in scorers["two"].jobs] == [(4, 8)] * 2
    for name, scorer in scorers.items():
        assert all(query in parts[name]["anchor"] for job in scorer.jobs for query in job.queries)


def test_a_router_model(directory: Path) -> None:
    routes = {"query": list(student(directory, 1)), "document": list(student(directory, 2))}
    router = SentenceTransformer(modules=[Router.for_query_document(routes["query"], routes["document"])], device="cpu")
    with pytest.raises(ValueError, match="router_mapping"):
        RerankerDataCollator.for_training(router, arguments(directory))
    scorer = MemoryScorer(random_scores())
    args = arguments(directory, router_mapping={"anchor": "query", "positive": "document"})
    before = [route[0].auto_model.embeddings.word_embeddings.weight.detach().clone() for route in routes.values()]
    train(router, args, dataset(2, 12), RerankerCachedGISTEmbedLoss(router, scorer))
    after = [route[0].auto_model.embeddings.word_embeddings.weight for route in routes.values()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(query in dataset(2, 12)["anchor"] for job in scorer.jobs for query in job.queries)


def test_without_the_collator_training_works_on_decoded_texts(
    directory: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    data = Dataset.from_dict({"anchor": ["The Value", "THE KEYS"] * 2, "positive": ["an item", "Logging"] * 2})
    scorer = MemoryScorer(random_scores())
    loss = RerankerCachedGISTEmbedLoss(model, scorer)
    SentenceTransformerTrainer(model, arguments(directory, max_steps=2), data, loss=loss).train()
    assert set(scorer.jobs[0].queries) == {"the value", "the keys"}
    assert sum("raw texts" in record.message for record in caplog.records) == 1
