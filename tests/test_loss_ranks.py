"""The loss in DistributedDataParallel: exact, one synchronisation a step, and figures of all ranks in the logs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from loss_client.trainer import RerankerTrainer

from .models import build_bi_encoder
from .ranks import WAIT, run_ranks
from .test_loss_surroundings import BOTH, NUCLEUS, expected_of, make
from .test_prefetch import arguments, used
from .training import MemoryScorer, assert_same_gradients, dataset, features, gradients, random_scores, texts

RANKS, ROWS = 2, 5
SETTINGS: list[dict[str, Any]] = [{"find_unused_parameters": True}, {"find_unused_parameters": False}]
VARIANTS: list[dict[str, Any]] = [BOTH, NUCLEUS]

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


def train(rank: int, directory: Path) -> None:
    """Run a rank: train three steps, the last of them with different numbers of rows, and evaluate."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}  # the ranks meet by a file
    dist.init_process_group("gloo", f"file://{directory / 'meet-train'}", WAIT, world_size=RANKS, rank=rank)
    try:
        model = SentenceTransformer(str(directory / "student"), device="cpu")
        scorer = MemoryScorer(random_scores())
        args = arguments(directory, logging_steps=2, ddp_backend="gloo", ddp_find_unused_parameters=True)
        args.dataloader_drop_last = False  # sentence-transformers sets it where several ranks train
        trainer = RerankerTrainer(
            model=model, args=args, train_dataset=dataset(3, 22), eval_dataset=dataset(3, 12),
            loss=make(model, scorer, margin=0.0),
        )  # fmt: skip
        trainer.train()
        if rank == 0:
            trainer.log({"learned": 1.0})  # logged by one rank alone, which must not wait for the other
        trainer.evaluate()
        jobs = [(job.queries, job.documents) for job in scorer.jobs if used(job)]
        history = [entry for entry in trainer.state.log_history if "learned" not in entry]
        streamed, refusal = train_on_a_stream(directory)
        torch.save(
            {"jobs": jobs, "history": history, "streamed": streamed, "refusal": refusal},
            directory / f"trained-{rank}.pt",
        )
    finally:
        dist.destroy_process_group()


def train_on_a_stream(directory: Path) -> tuple[list[list[int]], str]:
    """Train on an iterable dataset; return this rank's rows by batch, and the error for accelerate's dispatcher."""
    anchors = list(dataset(3, 16)["anchor"])
    data = dataset(3, 16).to_iterable_dataset()
    for dispatch in (True, None):
        model = SentenceTransformer(str(directory / "student"), device="cpu")
        args = arguments(
            directory, max_steps=2, ddp_backend="gloo", ddp_find_unused_parameters=True,
            accelerator_config={"dispatch_batches": dispatch},
        )  # fmt: skip
        scorer = MemoryScorer(random_scores())
        try:
            trainer = RerankerTrainer(model=model, args=args, train_dataset=data, loss=make(model, scorer))
        except ValueError as error:
            refusal = str(error)
        else:
            trainer.train()
    return [[anchors.index(query) for query in job.queries] for job in scorer.jobs if used(job)], refusal


@pytest.fixture(scope="module")
def trained(directory: Path) -> list[Result]:
    run_ranks(train, (directory,), RANKS)
    return [torch.load(directory / f"trained-{rank}.pt") for rank in range(RANKS)]


def test_each_rank_reads_its_part_of_an_iterable_dataset(trained: list[Result]) -> None:
    batches = [list(range(begin, begin + 4)) for begin in range(0, 16, 4)]
    assert [result["streamed"] for result in trained] == [batches[rank::RANKS] for rank in range(RANKS)]
    assert all("Set accelerator_config={'dispatch_batches': False}" in result["refusal"] for result in trained)


def test_every_rank_logs_the_figures_of_all_ranks(trained: list[Result]) -> None:
    results = trained
    jobs = [result["jobs"] for result in results]
    sizes = [[len(queries) for queries, _ in of_rank] for of_rank in jobs]
    assert [size[:3] for size in sizes] == [[4, 4, 4], [4, 4, 2]]
    score = random_scores()
    for position, (prefix, begin, end) in enumerate([("", 0, 2), ("", 2, 3), ("eval_", 3, None)]):
        grids = [score(*job) for of_rank in jobs for job in of_rank[begin:end]]
        positives = [grid.diagonal() for grid in grids]
        above = sum(int((grid > own[:, None]).sum()) for grid, own in zip(grids, positives, strict=True))
        negatives = sum(grid.size - len(grid) for grid in grids)
        for result in results:
            entry = result["history"][position]
            assert entry[f"{prefix}reranker/masked_fraction"] == pytest.approx(above / negatives)
            assert entry[f"{prefix}reranker/pairs"] == pytest.approx(np.mean([grid.size for grid in grids]))
            assert entry[f"{prefix}reranker/positive_score"] == pytest.approx(np.mean(np.concatenate(positives)))
