"""Two processes with a part of the batch each train as one process with all of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from loss_client.loss import RerankerCachedGISTEmbedLoss

from .models import build_bi_encoder
from .training import (
    MemoryScorer,
    assert_same_gradients,
    cosines_of,
    features,
    gradients,
    guide,
    loss_and_gradients,
    texts,
)

COLUMNS, ROWS, RANKS = 3, 8, 2
# The second batch is uneven: each rank has another number of rows, and of mini-batches.
SPLITS = [(4, 4), (2, 6)]
CONTRASTS: list[dict[str, Any]] = [
    {},
    {"contrast_anchors": True, "contrast_positives": True},
    {"contrast_anchors": True, "contrast_positives": True, "contrast_filter": "scores"},
]


def batch() -> list[list[str]]:
    """Eight rows; both ranks have copies of the other's texts."""
    columns = texts(COLUMNS, ROWS)
    columns[0][7], columns[1][6], columns[2][5] = columns[0][0], columns[1][1], columns[1][0]
    return columns


def load(directory: Path) -> tuple[SentenceTransformer, MemoryScorer]:
    model, judge = (SentenceTransformer(str(directory / name), device="cpu").eval() for name in ("student", "judge"))
    return model, MemoryScorer(cosines_of(judge))


def make(model: Any, scorer: Any, contrast: dict[str, Any], **options: Any) -> RerankerCachedGISTEmbedLoss:
    return RerankerCachedGISTEmbedLoss(
        model, scorer, temperature=0.05, mini_batch_size=3, margin=0.1, score_type="raw", **contrast, **options
    )


def work(rank: int, directory: Path, columns: list[list[str]]) -> None:
    """One rank: every split with every contrast, gradients averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    model, scorer = load(directory)
    dist.init_process_group("gloo", f"file://{directory / 'meet'}", timedelta(seconds=60), world_size=RANKS, rank=rank)
    try:
        results = []
        for split in SPLITS:
            first = sum(split[:rank])
            part = [column[first : first + split[rank]] for column in columns]
            for contrast in CONTRASTS:
                model.zero_grad()
                loss = make(model, scorer, contrast, gather_across_devices=True)
                prepared = features(model, part)
                # BERT's pooler takes no part.
                loss.model = DistributedDataParallel(model, find_unused_parameters=True)
                value = loss(prepared, None)
                value.backward()
                results.append((value.detach(), gradients(model), scorer.jobs[-1].queries))
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
def results(directory: Path) -> list[list[tuple[Tensor, dict[str, Tensor], list[str]]]]:
    spawn(work, (directory, batch()), nprocs=RANKS)
    return [torch.load(directory / f"result-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("split", range(len(SPLITS)))
@pytest.mark.parametrize("contrast", range(len(CONTRASTS)))
def test_two_processes_equal_one_with_the_whole_batch(
    directory: Path, results: list[Any], split: int, contrast: int
) -> None:
    model, scorer = load(directory)
    expected = loss_and_gradients(make(model, scorer, CONTRASTS[contrast]), features(model, batch()))
    ranks = [result[split * len(CONTRASTS) + contrast] for result in results]
    assert sum(float(value) for value, _, _ in ranks) / RANKS == pytest.approx(expected[0], abs=1e-5)
    for _, found, _ in ranks:
        assert_same_gradients(found, expected[1])


def test_each_process_has_its_own_anchors_scored_only(results: list[Any]) -> None:
    anchors = batch()[0]
    assert [rank[0][2] for rank in results] == [anchors[:4], anchors[4:]]
