"""RerankerTrainer: ``loss=`` is all that changes, beside sentence-transformers' trainer with everything set by hand."""

from __future__ import annotations

import inspect
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import TrainerCallback

from loss_client import (
    RerankerCachedGISTEmbedLoss,
    RerankerDataCollator,
    RerankerMetricsCallback,
    RerankerResumeCallback,
    RerankerTrainer,
)

from .stub_server import StubServer
from .test_prefetch import Recorder, arguments, make, used
from .training import MemoryScorer, dataset, random_scores, student, texts

PROMPTS = {"anchor": "query: ", "positive": "document: "}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(directory: Path) -> SentenceTransformer:
    return student(directory)


def losses_of(trainer: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def asked(scorer: MemoryScorer) -> list[tuple[list[str], list[str], Any]]:
    return [(job.queries, job.documents, job.options["instruction"]) for job in scorer.jobs if used(job)]


def warnings_of_texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "loss_client.filter.texts"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_trains_as_the_base_class_does_with_the_collator_made_by_hand(
    directory: Path, wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(directory, prompts=PROMPTS, logging_steps=1, learning_rate=1e-3, gradient_accumulation_steps=2)
    found: list[tuple[list[float], Any]] = []
    for trainer_class in (SentenceTransformerTrainer, RerankerTrainer):
        model, scorer = student(directory), MemoryScorer(random_scores())
        loss: Any = make(model, scorer)
        if wrapped:
            loss = MatryoshkaLoss(model, loss, [32, 16])
        by_hand = trainer_class is SentenceTransformerTrainer
        options = {"data_collator": RerankerDataCollator.for_training(model, args, loss)} if by_hand else {}
        trainer = trainer_class(model=model, args=args, train_dataset=dataset(3, 24), loss=loss, **options)
        trainer.train()
        found.append((losses_of(trainer), asked(scorer)))
    assert len(found[0][0]) == 3
    assert found[1] == found[0]
    assert warnings_of_texts(caplog) == []


def test_each_batch_is_asked_for_before_the_one_before_it_trains(directory: Path, model: SentenceTransformer) -> None:
    scorer = Recorder()
    loss = make(model, scorer)
    loss.register_forward_pre_hook(lambda *_: scorer.events.append("train"))
    RerankerTrainer(model=model, args=arguments(directory), train_dataset=dataset(3, 12), loss=loss).train()
    assert scorer.events == ["ask", "ask", "train", "ask", "train", "train"]


def test_the_collator_is_the_base_classes_own_with_texts_and_loss(directory: Path, model: SentenceTransformer) -> None:
    args = arguments(directory, prompts=PROMPTS, router_mapping={"anchor": "query", "positive": "document"})
    loss = make(model, MemoryScorer(random_scores()))
    collators = [
        made(model=model, args=args, train_dataset=dataset(2, 8), loss=loss).data_collator
        for made in (SentenceTransformerTrainer, RerankerTrainer)
    ]
    assert isinstance(collators[1], RerankerDataCollator)
    assert collators[1].loss is loss
    for name, value in vars(collators[0]).items():
        assert getattr(collators[1], name) == value


def test_several_losses_some_of_them_others_and_made_by_functions(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DatasetDict({"one": dataset(2, 8), "two": dataset(3, 8), "three": dataset(2, 8)})
    args = arguments(
        directory, max_steps=6, logging_steps=1, prompts={"one": {"anchor": "first: "}, "three": {"anchor": "third: "}}
    )
    found = []
    for trainer_class in (SentenceTransformerTrainer, RerankerTrainer):
        model = student(directory)
        scorers = {name: MemoryScorer(random_scores()) for name in ("one", "two")}
        losses: dict[str, Any] = {
            "one": lambda model, scorer=scorers["one"]: make(model, scorer, instruction="by the loss"),
            "two": make(model, scorers["two"]),
            "three": CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        }
        by_hand = trainer_class is SentenceTransformerTrainer
        options = {"data_collator": RerankerDataCollator.for_training(model, args)} if by_hand else {}
        trainer = trainer_class(model=model, args=args, train_dataset=data, loss=losses, **options)
        trainer.train()
        found.append((losses_of(trainer), [asked(scorer) for scorer in scorers.values()]))
    assert [len(jobs) for jobs in found[0][1]] == [2, 2]
    assert found[1] == found[0]
    assert warnings_of_texts(caplog) == []
    assert isinstance(trainer.data_collator, RerankerDataCollator)
    rows = [{"dataset_name": "three", **row} for row in dataset(2, 2)]
    plain = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=losses).data_collator
    assert trainer.data_collator(rows).keys() == plain(rows).keys()


def test_without_a_loss_of_this_package_it_is_the_base_class(directory: Path) -> None:
    columns = texts(2, 8)
    data = Dataset.from_dict({"first": columns[0], "second": columns[1], "score": [0.0, 1.0] * 4})
    args = arguments(directory, logging_steps=1, max_steps=2)
    found = []
    for trainer_class in (SentenceTransformerTrainer, RerankerTrainer):
        model = student(directory)
        trainer = trainer_class(model=model, args=args, train_dataset=data)  # with the base class's default loss
        batch = trainer.data_collator([data[0], data[1]])
        trainer.train()
        callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
        found.append((losses_of(trainer), batch.keys(), callbacks, type(trainer.loss)))
    assert found[1] == found[0]


@pytest.mark.parametrize("by_function", [False, True])
def test_a_model_that_is_made_anew_for_each_training(directory: Path, by_function: bool) -> None:
    scorer = MemoryScorer(random_scores())
    loss: Any = (lambda model: make(model, scorer)) if by_function else make(student(directory), scorer)
    trainer = RerankerTrainer(
        args=arguments(directory, max_steps=2), train_dataset=dataset(3, 8), loss=loss,
        model_init=lambda: student(directory),
    )  # fmt: skip
    trainer.train()
    assert trainer.loss.model is trainer.model
    # The collator began every job, and each served.
    assert sum(used(job) for job in scorer.jobs) == len(scorer.jobs) == trainer.loss.statistics.steps == 2


class Reporter(TrainerCallback):
    """Takes the place of TensorBoard's callback."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:  # type: ignore[override]
        self.entries.append(dict(logs))


@pytest.mark.parametrize("given", [False, True])
def test_reporters_get_the_filters_figures_also_of_evaluations(
    directory: Path, model: SentenceTransformer, given: bool
) -> None:
    loss, reporter = make(model, MemoryScorer(random_scores())), Reporter()
    callbacks = [reporter, RerankerMetricsCallback(loss)] if given else [reporter]
    trainer = RerankerTrainer(
        model=model, args=arguments(directory, max_steps=2, logging_steps=1), train_dataset=dataset(3, 8),
        eval_dataset=dataset(3, 4), loss=loss, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    trainer.log({"learned": 1.0})
    trainer.evaluate()
    assert [("reranker/pairs" in entry) for entry in reporter.entries] == [True, True, False, False, False]
    assert reporter.entries[-1]["eval_reranker/pairs"] == 4 * 8
    metrics = [one for one in trainer.callback_handler.callbacks if isinstance(one, RerankerMetricsCallback)]
    assert metrics == trainer.callback_handler.callbacks[:1]
    assert not given or metrics == callbacks[1:]


def test_a_given_collator_is_used_as_it_is(
    directory: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Recorder()
    loss = make(model, scorer)
    loss.register_forward_pre_hook(lambda *_: scorer.events.append("train"))
    args = arguments(directory, max_steps=2)
    collator = RerankerDataCollator.for_training(model, args)
    RerankerTrainer(model=model, args=args, train_dataset=dataset(3, 8), loss=loss, data_collator=collator).train()
    assert collator.loss is None
    assert scorer.events == ["train", "ask"] * 2
    assert warnings_of_texts(caplog) == []


def test_the_warning_about_decoded_texts_names_the_trainer(
    directory: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    loss = make(model, MemoryScorer(random_scores()))
    with caplog.at_level(logging.WARNING):
        SentenceTransformerTrainer(
            model=model, args=arguments(directory, max_steps=1), train_dataset=dataset(2, 4), loss=loss
        ).train()
    (message,) = warnings_of_texts(caplog)
    assert "Use RerankerTrainer, or pass data_collator=RerankerDataCollator.for_training(model, args, loss)" in message


class Counting(RerankerCachedGISTEmbedLoss):
    """A loss with state: the number of its steps, also of those before training was resumed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.count = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        self.count += self.model.training
        return super().forward(*args, **options)

    def resume_state(self) -> dict[str, float]:
        return {"count": self.count}

    def load_resume_state(self, state: dict[str, float]) -> None:
        self.count = int(state["count"])


def resumed(
    directory: Path, steps: int, trainer_class: type[SentenceTransformerTrainer], **options: Any
) -> tuple[dict[str, Any], list[int]]:
    """Train two datasets with a loss each, one of them inside another, and save at the end.

    Returns the callbacks' states in the checkpoint, and the number of steps that each loss counts.
    """
    model, scorer = student(directory), MemoryScorer(random_scores())
    inner = [Counting(model, scorer, temperature=0.05, score_type="raw") for _ in range(2)]
    losses: dict[str, Any] = {"one": inner[0], "two": MatryoshkaLoss(model, inner[1], [32])}
    args = arguments(
        directory, max_steps=steps, save_strategy="steps", multi_dataset_batch_sampler="proportional", **options
    )
    data = DatasetDict({"one": dataset(2, 20), "two": dataset(2, 4)})
    trainer = trainer_class(model=model, args=args, train_dataset=data, loss=dict(reversed(losses.items())))
    trainer.train(resume_from_checkpoint=steps > 1)
    saved = json.loads((directory / "output" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return saved["stateful_callbacks"], [loss.count for loss in inner]


def test_the_losses_state_is_saved_and_restored(tmp_path: Path) -> None:
    states, _ = resumed(tmp_path, 1, SentenceTransformerTrainer)
    assert set(states) == {"TrainerControl"}
    # A checkpoint without a state.
    states, first = resumed(tmp_path, 4, RerankerTrainer)
    assert sum(first) == 3
    assert first[0] != first[1]
    assert states["RerankerLosses"]["attributes"] == {"one": {"count": first[0]}, "two.loss": {"count": first[1]}}
    # The option concerns transformers' own stateful callbacks.
    _, second = resumed(tmp_path, 5, RerankerTrainer, restore_callback_states_from_checkpoint=True)
    assert sum(second) == 4
    assert all(after >= before for before, after in zip(first, second, strict=True))


def test_a_loss_without_state_leaves_the_checkpoint_as_it_was(directory: Path, model: SentenceTransformer) -> None:
    loss = MultipleNegativesRankingLoss(model)
    callback = RerankerResumeCallback(loss)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments(directory, max_steps=1), train_dataset=dataset(2, 4), loss=loss,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert set(trainer.state.stateful_callbacks) == {"TrainerControl"}


def test_the_signature_is_the_base_classes() -> None:
    assert inspect.signature(RerankerTrainer) == inspect.signature(SentenceTransformerTrainer)


@pytest.mark.parametrize("documented", [RerankerTrainer, RerankerCachedGISTEmbedLoss])
def test_the_example_in_the_docstring_runs(
    documented: type, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student(directory)
    monkeypatch.chdir(tmp_path)
    _, _, after = inspect.cleandoc(documented.__doc__ or "").partition("Example:\n    ::\n\n")
    lines = after.split("\n\nAttributes:")[0]
    with StubServer() as server:
        program = textwrap.dedent(lines).replace("localhost:50051", server.target)
        program = program.replace("microsoft/mpnet-base", str(directory / "student-0"))
        program = program.replace(
            '"output", ', '"output", max_steps=1, report_to="none", use_cpu=True, save_strategy="no", '
        )
        exec(program, {})
        assert server.streams
    assert warnings_of_texts(caplog) == []
