"""Gathering: two processes, each with a part of the batch, train like one process with the whole batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from loss_client.client.errors import RerankerUnavailableError
from loss_client.collator import RerankerDataCollator
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .models import build_bi_encoder
from .ranks import WAIT, run_ranks
from .test_prefetch import batch_of
from .training import (
    MemoryScorer,
    MemoryScores,
    assert_same_gradients,
    cosines_of,
    features,
    gradients,
    guide,
    loss_and_gradients,
    random_scores,
    texts,
)

COLUMNS, ROWS, RANKS = 3, 8, 2
NAMES = ["anchor", "positive", "negative"]

Result = dict[str, Any]

# The second batch is uneven: the ranks have different numbers of rows and of mini-batches.
SPLITS = [(4, 4), (2, 6)]
BOTH: dict[str, Any] = {"contrast_anchors": True, "contrast_positives": True}
CONTRASTS: list[dict[str, Any]] = [
    {},
    BOTH,
    {**BOTH, "contrast_filter": "scores"},
    {"contrast_anchors": True},
    {"contrast_positives": True, "contrast_filter": "scores"},
]
# With top_p this close to 1 every candidate is scored.
CHOICES: list[dict[str, Any]] = [{"candidates": "all"}, {"candidates": "nearest", "top_p": 1 - 1e-12}]


def embed(batch: list[str]) -> NDArray[np.float64]:
    """Embed texts at random, equal texts alike."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in batch])


# So many pairs that every one is chosen. With ``contrast_filter="known"`` a rank lacks scores of other ranks' anchors.
NEAREST: dict[str, Any] = {"candidates": "nearest", "per_anchor": 1000, "preselector": embed}
EXACT = [contrast for contrast in CONTRASTS if not contrast or "contrast_filter" in contrast]
RUNS = [*itertools.product(SPLITS, CONTRASTS, CHOICES), *itertools.product(SPLITS, EXACT, [NEAREST])]


def batch() -> list[list[str]]:
    """Eight rows; both ranks have copies of the other's texts."""
    columns = texts(COLUMNS, ROWS)
    columns[0][7], columns[1][6], columns[2][5] = columns[0][0], columns[1][1], columns[1][0]
    return columns


def load(directory: Path) -> tuple[SentenceTransformer, MemoryScorer]:
    model, judge = (SentenceTransformer(str(directory / name), device="cpu").eval() for name in ("student", "judge"))
    return model, MemoryScorer(cosines_of(judge))


def make(model: Any, scorer: Any, contrast: dict[str, Any], **options: Any) -> RerankerCachedGISTEmbedLoss:
    defaults: dict[str, Any] = {"temperature": 0.05, "mini_batch_size": 3, "margin": 0.1, "score_type": "raw"}
    return RerankerCachedGISTEmbedLoss(model, scorer, **{**defaults, **contrast, **options})


def part_of(columns: list[list[str]], split: tuple[int, int], rank: int) -> list[list[str]]:
    """Return a rank's rows."""
    first = sum(split[:rank])
    return [column[first : first + split[rank]] for column in columns]


def one_step(model: SentenceTransformer, scorer: MemoryScorer, batch: list[dict[str, Any]], **options: Any) -> Result:
    """Run one step of this rank, with the gradients averaged by DistributedDataParallel."""
    model.zero_grad()
    begun = len(scorer.jobs)
    loss = make(model, scorer, {}, gather_across_devices=True, **options)
    # BERT's pooler has no influence on the embeddings.
    loss.model = DistributedDataParallel(model, find_unused_parameters=True)
    value = loss(batch, None)
    value.backward()
    jobs = scorer.jobs[begun:]
    return {
        "value": float(value.detach()),
        "gradients": gradients(model),
        "queries": [query for job in jobs for query in job.queries],
        "released": [sum(end - begin for begin, end in job.released) == job.shape[0] for job in jobs],
        "unfiltered": loss.statistics.unfiltered_steps,
    }


def prefetched(
    model: SentenceTransformer,
    scorer: MemoryScorer,
    rank: int,
    columns: list[list[str]],
    store: dist.Store,
    choice: dict[str, Any],
    name: str,
) -> Result:
    """Run a step on a batch that the collator scores ahead; the second rank waits until the first has collated."""
    rows = [dict(zip(NAMES, row, strict=True)) for row in zip(*columns, strict=True)]
    ahead = RerankerDataCollator.for_training(
        model, loss=make(model, scorer, BOTH, gather_across_devices=True, **choice)
    )
    if rank == 1:
        store.wait([name], WAIT)
    begun = len(scorer.jobs)
    collated = ahead(rows)
    asked = {text for job in scorer.jobs[begun:] for text in (*job.queries, *job.documents)}
    store.set(name, "collated")
    loss = ahead.loss
    assert isinstance(loss, RerankerCachedGISTEmbedLoss)
    model.zero_grad()
    loss.model = DistributedDataParallel(model, find_unused_parameters=True)
    value = loss(batch_of(collated), None)
    value.backward()
    jobs = scorer.jobs[begun:]
    pairs = [(query, document) for job in jobs for query, document in asked_pairs(job)]
    return {"value": float(value.detach()), "gradients": gradients(model), "ahead": asked, "pairs": pairs}


def asked_pairs(job: MemoryScores) -> list[tuple[str, str]]:
    """Return the pairs of a job: those of a grid, or with one column the listed pairs."""
    listed = job.shape[1] == 1 and len(job.queries) == len(job.documents)
    return list(
        zip(job.queries, job.documents, strict=True) if listed else itertools.product(job.queries, job.documents)
    )


def work(rank: int, directory: Path, columns: list[list[str]]) -> None:
    """Run a rank: every split with every contrast and both kinds of candidates, then the other tests' steps."""
    torch.set_num_threads(1)
    model, scorer = load(directory)
    store = dist.FileStore(str(directory / "meet"), RANKS)
    dist.init_process_group("gloo", store=store, timeout=WAIT, world_size=RANKS, rank=rank)
    try:
        results: dict[str, Any] = {
            "runs": [
                one_step(model, scorer, features(model, part_of(columns, split, rank)), **contrast, **choice)
                for split, contrast, choice in RUNS
            ]
        }
        results["prefetched"] = [
            prefetched(model, scorer, rank, part_of(columns, SPLITS[1], rank), store, choice, f"collated-{number}")
            for number, choice in enumerate(CHOICES)
        ]
        # The second rank has no reranker.
        failing = MemoryScorer(random_scores(), RerankerUnavailableError("nobody there"))
        mine = features(model, part_of(columns, SPLITS[1], rank))
        results["unfiltered"] = [
            one_step(model, failing if rank else scorer, mine, **BOTH, **choice, on_error="unfiltered")
            for choice in CHOICES
        ]
        try:
            one_step(model, scorer, mine[: 2 + rank])
        except ValueError as error:
            results["columns"] = str(error)
        torch.save(results, directory / f"result-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gather")
    build_bi_encoder(path / "student")
    guide(path).save(str(path / "judge"))
    return path


@pytest.fixture(scope="module")
def results(directory: Path) -> list[dict[str, Any]]:
    run_ranks(work, (directory, batch()), RANKS)
    return [torch.load(directory / f"result-{rank}.pt") for rank in range(RANKS)]


def whole(directory: Path, contrast: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Run one process with the whole batch and every pair scored."""
    model, scorer = load(directory)
    return loss_and_gradients(make(model, scorer, contrast), features(model, batch()))


def assert_same(ranks: list[Result], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert sum(rank["value"] for rank in ranks) / RANKS == pytest.approx(expected[0], abs=1e-5)
    for rank in ranks:
        assert_same_gradients(rank["gradients"], expected[1])


@pytest.mark.parametrize("contrast", range(len(CONTRASTS)))
def test_two_processes_equal_one_with_the_whole_batch(
    directory: Path, results: list[dict[str, Any]], contrast: int
) -> None:
    expected = whole(directory, CONTRASTS[contrast])
    for number, (_, used, _) in enumerate(RUNS):
        if used == CONTRASTS[contrast]:
            assert_same([rank["runs"][number] for rank in results], expected)


def test_each_process_has_its_own_anchors_scored_only(results: list[dict[str, Any]]) -> None:
    anchors = batch()[0]
    for number, (split, contrast, _) in enumerate(RUNS):
        if not contrast:  # contrast terms also need scores of the other rows' anchors, or of positives as queries
            asked = [set(rank["runs"][number]["queries"]) for rank in results]
            assert asked == [set(anchors[: split[0]]), set(anchors[split[0] :])]


def test_each_process_gives_its_scores_back(results: list[dict[str, Any]]) -> None:
    assert all(all(run["released"]) and run["released"] for rank in results for run in rank["runs"])


@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_a_batch_scored_ahead_needs_no_other_process_until_the_loss_does(
    directory: Path, results: list[dict[str, Any]], choice: int
) -> None:
    ranks = [rank["prefetched"][choice] for rank in results]
    assert_same(ranks, whole(directory, BOTH))
    for number, rank in enumerate(ranks):
        own = {text for column in part_of(batch(), SPLITS[1], number) for text in column}
        assert rank["ahead"] <= own
        assert rank["ahead"] >= {text for column in part_of(batch(), SPLITS[1], number)[:2] for text in column}
        asked = {document for _, document in rank["pairs"]}
        assert asked == {text for column in batch()[1:] for text in column}


@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_a_process_without_a_reranker_does_not_hold_up_the_other(results: list[dict[str, Any]], choice: int) -> None:
    ranks = [rank["unfiltered"][choice] for rank in results]
    assert [rank["unfiltered"] for rank in ranks] == [0, 1]
    assert_same_gradients(ranks[0]["gradients"], ranks[1]["gradients"])
    assert ranks[0]["value"] != pytest.approx(ranks[1]["value"])


def test_processes_with_other_columns_are_told(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert r"[2, 3] columns" in rank["columns"]
