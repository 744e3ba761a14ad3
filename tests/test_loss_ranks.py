"""The loss in DistributedDataParallel, with one process and with two: exact, and one synchronisation a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from .models import build_bi_encoder
from .ranks import WAIT, run_ranks
from .test_loss_surroundings import BOTH, MASS, expected_of, make
from .training import MemoryScorer, assert_same_gradients, features, gradients, random_scores, texts

RANKS, ROWS = 2, 5
SETTINGS: list[dict[str, Any]] = [{"find_unused_parameters": True}, {"find_unused_parameters": False}]
VARIANTS: list[dict[str, Any]] = [BOTH, MASS]

Result = dict[str, Any]


def part_of(columns: list[list[str]], rank: int, batch: int) -> list[list[str]]:
    """Return one of the two batches of one of the two ranks."""
    first = (2 * rank + batch) * ROWS
    return [column[first : first + ROWS] for column in columns]


def load(directory: Path) -> SentenceTransformer:
    """Return the model with an untrained pooler: ``find_unused_parameters=False`` allows no unused parameters."""
    model = SentenceTransformer(str(directory / "student"), device="cpu").eval()
    model[0].auto_model.pooler.requires_grad_(False)
    return model


def steps(directory: Path, rank: int, columns: list[list[str]]) -> list[Result]:
    """Run for each setting and variant one step, then one of two batches of which only the second synchronises."""
    results = []
    for setting in SETTINGS:
        for variant in VARIANTS:
            model = load(directory)
            loss = make(model, MemoryScorer(random_scores()), **variant)
            wrapped = DistributedDataParallel(model, **setting)
            synchronised: list[int] = []

            # Without annotations, because DistributedDataParallel cannot read postponed ones.
            def count(calls, bucket):  # type: ignore[no-untyped-def]
                calls.append(1)
                return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

            wrapped.register_comm_hook(synchronised, count)
            loss.model = wrapped
            first, second = (features(model, part_of(columns, rank, batch)) for batch in range(2))

            value = loss(first, None)
            value.backward()
            result = {"value": float(value.detach()), "one": gradients(model), "synchronised": len(synchronised)}
            model.zero_grad()
            with wrapped.no_sync():
                loss(first, None).backward()
            result["before"] = len(synchronised)
            loss(second, None).backward()
            results.append({**result, "two": gradients(model), "after": len(synchronised)})
    return results


def work(rank: int, directory: Path, columns: list[list[str]]) -> None:
    """Run a rank. The first rank runs before in a process group of its own."""
    torch.set_num_threads(1)
    for ranks in (1, RANKS):
        if rank < ranks:
            meet = f"file://{directory / f'meet-{ranks}'}"
            dist.init_process_group("gloo", meet, WAIT, world_size=ranks, rank=rank)
            try:
                torch.save(steps(directory, rank, columns), directory / f"result-{ranks}-{rank}.pt")
            finally:
                dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    build_bi_encoder(path / "student")
    run_ranks(work, (path, texts(3, 2 * RANKS * ROWS)), RANKS)
    return path


@pytest.mark.parametrize("ranks", [1, RANKS])
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_gradients_are_the_mean_of_the_ranks_and_synchronised_once(directory: Path, ranks: int, variant: int) -> None:
    model = load(directory)
    columns = texts(3, 2 * RANKS * ROWS)
    batches = [[part_of(columns, rank, batch) for batch in range(2)] for rank in range(ranks)]
    expected = [
        [expected_of(model, features(model, batch), batch, **VARIANTS[variant]) for batch in both] for both in batches
    ]
    names = expected[0][0][1].keys()
    one = {name: sum(first[1][name] for first, _ in expected) / ranks for name in names}
    two = {name: sum(first[1][name] + second[1][name] for first, second in expected) / ranks for name in names}
    for rank in range(ranks):
        results = torch.load(directory / f"result-{ranks}-{rank}.pt")
        for setting in range(len(SETTINGS)):
            found = results[setting * len(VARIANTS) + variant]
            assert found["value"] == pytest.approx(expected[rank][0][0], abs=1e-5)
            assert_same_gradients(found["one"], one)
            assert_same_gradients(found["two"], two)
            # All gradients fit into one bucket: one call for each synchronisation, none under no_sync.
            assert [found[name] for name in ("synchronised", "before", "after")] == [1, 1, 2]
