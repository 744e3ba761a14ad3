"""Texts of the next batch travel with those of the present one, so that each rank scores it ahead in full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer

from loss_client.client.errors import RerankerUnavailableError
from loss_client.collator import RerankerDataCollator
from loss_client.loss import RerankerCachedGISTEmbedLoss
from loss_client.trainer import RerankerTrainer

from .models import build_bi_encoder
from .ranks import WAIT, run_ranks
from .test_gather import NEAREST
from .test_prefetch import arguments, batch_of, used
from .training import MemoryScorer, MemoryScores, assert_same_gradients, dataset, random_scores, texts

RANKS, ROWS, BATCHES = 2, 2, 12
CONTRAST: dict[str, Any] = {"contrast_anchors": True, "contrast_positives": True, "contrast_filter": "scores"}
OPTIONS: list[dict[str, Any]] = [{}, CONTRAST, {"candidates": "nearest", "top_p": 1 - 0.3}, NEAREST]
TOP_P, PRESELECTED = 2, 3

Action = tuple[Any, ...]


def both(*actions: Action) -> list[list[Action]]:
    return [list(actions)] * RANKS


def in_turn(*numbers: int) -> list[Action]:
    """Train batches of which each but the first is collated before the one before it trains."""
    actions: list[Action] = [("collate", numbers[0])]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        actions += [] if following is None else [("collate", following)]
        actions.append(("train", number))
    return actions


def train(*numbers: int) -> list[Action]:
    return [("train", number) for number in numbers]


def collate(*numbers: int) -> list[Action]:
    return [("collate", number) for number in numbers]


# For each scenario the actions of each rank; both ranks train the same numbers in the same order.
SCENARIOS: dict[str, list[list[Action]]] = {
    "one batch ahead": both(*in_turn(0, 1, 2)),
    "accumulation": both(*collate(0, 1, 2, 3), *train(0, 1, 2, 3)),
    "one rank ahead": [in_turn(0, 1, 2), [*collate(0), *train(0), *collate(1), *train(1), *collate(2), *train(2)]],
    "different numbers ahead": [[*collate(0, 1, 2, 3), *train(0, 1, 2, 3)], in_turn(0, 1, 2, 3)],
    "evaluation between": both(
        *collate(0, 1), *train(0), *collate(4, 5), *train(4), *train(5), *collate(2), *train(1, 2)
    ),
    "dropped on one rank": [
        [*collate(0, 1, 2), *train(0), ("drop", 1), *collate(1), *train(1, 2)],
        [*collate(0, 1, 2), *train(0, 1, 2)],
    ],
    "skipped on both ranks": both(*collate(0, 1, 2), *train(0), ("drop", 1), *train(2)),
    "failed on one rank": [
        [*collate(0, 1, 2), *train(0), ("fail", 1), *train(1, 2)],
        [*collate(0, 1, 2), *train(0, 1, 2)],
    ],
    "no scores on one rank": [
        [*collate(0, 1), ("refuse",), *train(0), ("serve",), *train(1)],
        [*collate(0, 1), *train(0, 1)],
    ],
    "two losses": [
        [*collate(0), ("collate", 1, "other"), *train(0), *collate(2), *train(1), *train(2)],
        [*collate(0), ("collate", 1, "other"), *train(0), *collate(2), *train(1), *train(2)],
    ],
    "two losses, another order": [
        [*collate(0, 2), ("collate", 1, "other"), ("collate", 3, "narrow"), *train(0, 1, 2, 3)],
        [*collate(0), ("collate", 3, "narrow"), ("collate", 1, "other"), *collate(2), *train(0, 1, 2, 3)],
    ],
    "too many ahead": both(*collate(*range(BATCHES)), *train(*reversed(range(BATCHES)))),
}
RUNS = [
    *((0, scenario) for scenario in SCENARIOS),
    *((options, scenario) for options in (1, TOP_P) for scenario in ("one batch ahead", "dropped on one rank")),
    *((PRESELECTED, scenario) for scenario in SCENARIOS if "other" not in str(SCENARIOS[scenario])),
]


def rows_of(columns: list[list[str]], rank: int, number: int) -> list[dict[str, str]]:
    """Return a rank's rows of a batch; the ranks have different numbers of rows in every third batch."""
    begin = (RANKS * number + rank) * ROWS
    end = begin + ROWS - (rank == 1 and number % 3 == 2)
    rows = [dict(zip(("anchor", "positive", "negative"), row, strict=True)) for row in zip(*columns, strict=True)]
    return rows[begin:end]


def documents_of(columns: list[list[str]], number: int) -> set[str]:
    """Return the documents of all ranks' parts of a batch."""
    rows = [row for rank in range(RANKS) for row in rows_of(columns, rank, number)]
    return {row[name] for row in rows for name in ("positive", "negative")}


class Rank:
    """A rank that collates, drops and trains batches, and notes what its loss returns.

    Attributes:
        found: For each trained batch the loss, the number of masked negatives, and that of all negatives.
        new_jobs: For each trained batch the number of jobs that began with its anchors while it trained.
        complete: For each trained batch whether its anchors were being scored with all ranks' documents before.
    """

    def __init__(self, rank: int, columns: list[list[str]], model: Any, ahead: bool, **options: Any) -> None:
        self.rank = rank
        self.columns = columns
        self.ahead = ahead
        self.scorer = MemoryScorer(random_scores())
        self.found: list[tuple[float, int, int]] = []
        self.new_jobs: list[int] = []
        self.complete: list[bool] = []
        self._jobs: dict[int, list[MemoryScores]] = {}
        self._batches: dict[int, tuple[str, list[dict[str, Any]]]] = {}
        defaults: dict[str, Any] = {"score_type": "raw", "margin": 0.1, "gather_across_devices": True}
        self.losses = {
            name: RerankerCachedGISTEmbedLoss(model, self.scorer, 0.05, 1, **{**defaults, **options})
            for name in ("usual", "other", "narrow")
        }
        self._collators = {
            name: RerankerDataCollator.for_training(model, loss=loss if ahead else None)
            for name, loss in self.losses.items()
        }

    def act(self, kind: str, number: int = -1, name: str = "usual") -> None:
        if kind == "collate":
            rows = rows_of(self.columns, self.rank, number)
            if name == "narrow":
                rows = [{key: row[key] for key in ("anchor", "positive")} for row in rows]
            begun = len(self.scorer.jobs)
            self._batches[number] = name, batch_of(self._collators[name](rows))
            self._jobs[number] = self.scorer.jobs[begun:]
        elif kind == "drop":
            del self._batches[number]
        elif kind == "fail" and self.ahead:
            for job in self._jobs[number]:
                job.error = RerankerUnavailableError("lost")
        elif kind in ("refuse", "serve"):
            self.scorer._error = RerankerUnavailableError("nobody there") if kind == "refuse" else None
        elif kind == "train":
            name, batch = self._batches.pop(number)
            loss, begun = self.losses[name], len(self.scorer.jobs)
            loss.statistics.reset()
            anchors = {row["anchor"] for row in rows_of(self.columns, self.rank, number)}
            asked = {text for job in self.scorer.jobs if anchors & set(job.queries) for text in job.documents}
            self.complete.append(documents_of(self.columns, number) <= asked)
            with torch.no_grad():
                value = float(loss(batch, None))
            del batch
            self.new_jobs.append(len([job for job in self.scorer.jobs[begun:] if anchors & set(job.queries)]))
            self.found.append((value, loss.statistics.masked_negatives, loss.statistics.negatives))


def work(rank: int, directory: Path, columns: list[list[str]]) -> None:
    """Run a rank: all scenarios with all options, with batches scored ahead and without."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory / 'meet'}", WAIT, world_size=RANKS, rank=rank)
    try:
        model = SentenceTransformer(str(directory / "student"), device="cpu").eval()
        results = {}
        for options, scenario in RUNS:
            ranks = [
                Rank(rank, columns, model, ahead, **OPTIONS[options], on_error="unfiltered") for ahead in (False, True)
            ]
            for one in ranks:
                for action in SCENARIOS[scenario][rank]:
                    one.act(*action)
            results[options, scenario] = [one.found for one in ranks]
            results[options, scenario, "jobs"] = ranks[1].new_jobs, ranks[1].complete
        torch.save(results, directory / f"result-{rank}.pt")
        torch.save(trained(directory), directory / f"trained-{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained(directory: Path) -> list[dict[str, Any]]:
    """Train with accumulation, evaluation in the middle and a short last batch; without a batch ahead and with."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}  # the ranks meet by a file
    results = []
    for ahead in (False, True):
        model = SentenceTransformer(str(directory / "student"), device="cpu")
        args = arguments(
            directory, max_steps=4, ddp_backend="gloo", ddp_find_unused_parameters=True, learning_rate=1e-3, seed=5,
            gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        args.dataloader_drop_last = False  # sentence-transformers sets it where several ranks train
        scorer = MemoryScorer(random_scores())
        loss = RerankerCachedGISTEmbedLoss(
            model, scorer, 0.05, 2, score_type="raw", margin=0.1, gather_across_devices=True
        )
        collator = RerankerDataCollator.for_training(model, args, loss if ahead else None)
        trainer = RerankerTrainer(
            model=model, args=args, train_dataset=dataset(3, 30), eval_dataset=dataset(3, 12), loss=loss,
            data_collator=collator,
        )  # fmt: skip
        trainer.train()
        named = model.named_parameters()  # the pooler is initialized at random and not used
        results.append({
            "weights": {name: value.detach().clone() for name, value in named if "pooler" not in name},
            "losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
            "jobs": sum(used(job) for job in scorer.jobs),
        })  # fmt: skip
    return results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ahead")
    build_bi_encoder(path / "student")
    run_ranks(work, (path, texts(3, RANKS * ROWS * BATCHES)), RANKS)
    return path


@pytest.fixture(scope="module")
def results(directory: Path) -> list[dict[Any, Any]]:
    return [torch.load(directory / f"result-{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize(("options", "scenario"), RUNS)
def test_losses_and_masks_are_those_without_a_batch_ahead(
    results: list[dict[Any, Any]], options: int, scenario: str
) -> None:
    for rank in results:
        without, ahead = rank[options, scenario]
        assert len(without) == len(ahead) > 0
        for expected, found in zip(without, ahead, strict=True):
            assert found[0] == pytest.approx(expected[0], rel=1e-6)
            assert found[1:] == expected[1:]


@pytest.mark.parametrize(
    ("options", "scenario"),
    [(0, "one batch ahead"), (1, "one batch ahead"), (0, "accumulation"), (0, "two losses")],
)
def test_a_batch_is_scored_with_all_documents_before_it_trains(
    results: list[dict[Any, Any]], options: int, scenario: str
) -> None:
    for rank in results:
        new_jobs, complete = rank[options, scenario, "jobs"]
        assert all(complete[1:])
        assert not any(new_jobs[1:])


def test_only_what_a_rank_had_not_announced_is_scored_when_the_batch_trains(results: list[dict[Any, Any]]) -> None:
    new_jobs = results[0][0, "one rank ahead", "jobs"][0]
    assert new_jobs == [1, 1, 1]
    dropped = [rank[0, "dropped on one rank", "jobs"][0] for rank in results]
    assert dropped[0][1] == 1  # its new job was begun without the other rank's documents
    assert dropped[1][1] == 0


def test_training_is_the_same_with_and_without(directory: Path) -> None:
    for rank in range(RANKS):
        without, ahead = torch.load(directory / f"trained-{rank}.pt", weights_only=False)
        assert_same_gradients(ahead["weights"], without["weights"])
        assert ahead["losses"] == pytest.approx(without["losses"], rel=1e-5)
        assert len(ahead["losses"]) == 4
