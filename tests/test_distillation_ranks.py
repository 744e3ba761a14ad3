"""Soft targets in two processes with uneven batches: exact, and one temperature for all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loss_client.filter.distillation import Distillation
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .models import build_bi_encoder
from .ranks import WAIT, run_ranks
from .soft_targets import Reference, options_of
from .test_loss_surroundings import batch, embeddings
from .training import MemoryScorer, assert_same_gradients, features, gradients, random_scores, texts

PARTS = [slice(0, 2), slice(2, 7)]
GUIDE = random_scores()
RUNS: list[tuple[Distillation, bool]] = [
    (Distillation(weight=0.7, temperature=0.3), True),
    (Distillation(weight=0.7), True),
    (Distillation(weight=0.7), False),
]


def columns() -> list[list[str]]:
    """Seven rows; both ranks have copies of the other's texts."""
    return [[*column, other[0]] for column, other in zip(batch(), texts(3, 7), strict=True)]


def load(directory: Path) -> SentenceTransformer:
    """Return the model in training mode, without dropout."""
    model = SentenceTransformer(str(directory / "student"), device="cpu").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def work(rank: int, directory: Path, whole: list[list[str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory / 'meet'}", WAIT, world_size=len(PARTS), rank=rank)
    results = []
    for settings, gather in RUNS:
        model = load(directory)
        options = options_of(settings, gather_across_devices=gather)
        loss = RerankerCachedGISTEmbedLoss(model, MemoryScorer(GUIDE), **options)
        loss.model = DistributedDataParallel(model, find_unused_parameters=True)
        value = loss(features(model, [column[PARTS[rank]] for column in whole]), None)
        value.backward()
        results.append((float(value.detach()), gradients(model), loss.distill_temperature))
    torch.save(results, directory / f"result-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    build_bi_encoder(path / "student")
    run_ranks(work, (path, columns()), len(PARTS))
    return path


@pytest.mark.parametrize("run", range(len(RUNS)))
def test_ranks_train_like_one_process_with_one_temperature(directory: Path, run: int) -> None:
    settings, gather = RUNS[run]
    results: list[tuple[float, dict[str, Any], float]] = [
        torch.load(directory / f"result-{rank}.pt")[run] for rank in range(len(PARTS))
    ]
    temperature = results[0][2]
    assert results[1][2] == temperature
    model = load(directory)
    whole = columns()
    parts = [whole] if gather else [[column[part] for column in whole] for part in PARTS]
    terms = [Reference(embeddings(model, features(model, part)), part, GUIDE) for part in parts]
    if settings.temperature == "auto":
        rows = [len(each.rows) for each in terms]
        entropies = [each.entropy(temperature) * n for each, n in zip(terms, rows, strict=True)]
        assert sum(entropies) / sum(rows) == pytest.approx(settings.entropy, abs=0.01)
    else:
        assert temperature == settings.temperature
    values = [each.contrasted() + settings.weight * each.distilled(temperature) for each in terms]
    expected = torch.stack(values).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    # With gathering each rank's value is its part of the mean over all rows.
    assert sum(value for value, _, _ in results) / 2 == pytest.approx(float(expected.detach()), rel=1e-5)
    for _, found, _ in results:
        assert_same_gradients(found, gradients(model))
