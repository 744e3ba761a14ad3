"""Benchmark of several ranks: time of a step over the longer of training alone and scoring alone.

The ranks train together with ``gather_across_devices``: each rank's anchors are scored with the documents of all ranks.
Most of these texts reach a rank with the gather of the batch before, so that the scoring of all pairs can begin a batch
ahead. One server of fixed speed scores the pairs of all ranks.

The model sleeps for most of the time that a batch takes, as in ``loss_accumulation``.

python -m benchmarks.loss_ranks JOB  is the program of one rank; the benchmark starts it.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.report import Figure
from benchmarks.rounds import Spread
from examples.program import prepare_process

RANKS = (2, 4)
RATIOS = (0.5, 1.0, 2.0)
_QUICK_RANKS = (2,)
_QUICK_RATIOS = (1.0,)
_BATCH = 16
_QUICK_BATCH = 8
_STEPS = 6
_QUICK_STEPS = 2
_SKIPPED_STEPS = 2
_ROUNDS = 2
_PASS_SECONDS = 0.05
_QUICK_PASS_SECONDS = 0.01
_MAXIMUM_SECONDS = 600.0
_RESULT = "measured "


@dataclass(frozen=True, slots=True)
class Round:
    """Measurements for one number of ranks and one ratio in one round, taken one right after the other.

    Attributes:
        ranks: Number of ranks.
        ratio: Intended score / alone.
        alone: Seconds of a step without a reranker.
        score: Seconds in which the server scores the pairs of all ranks' batches, while no training runs.
        step: Seconds of a step with the reranker.
    """

    ranks: int
    ratio: float
    alone: float
    score: float
    step: float

    @property
    def bound(self) -> float:
        """Lower bound of the mean time of a step, in seconds."""
        return max(self.alone, self.score)


def ranks_figures(bench: Bench) -> list[Figure]:
    """Measure the time of a step for each number of ranks and each ratio of scoring to training.

    Args:
        bench: The run.
    """
    quick = bench.scale < 1
    batch, steps = (_QUICK_BATCH, _QUICK_STEPS) if quick else (_BATCH, _STEPS)
    found: dict[tuple[int, float], list[Round]] = {}
    for ranks in _QUICK_RANKS if quick else RANKS:
        rows = ranks * batch * (_SKIPPED_STEPS + steps + 1)
        texts = bench.corpus.grid(rows, rows)
        for one in _train_together(bench, ranks, batch, steps, list(texts.queries), list(texts.documents), quick):
            found.setdefault((one.ranks, one.ratio), []).append(one)
            bench.say(
                f"{ranks} ranks, score/train {one.ratio:g}: train {one.alone:.3f} s, score {one.score:.3f} s, "
                f"step {one.step:.3f} s"
            )
    return list(figures(found))


def figures(found: Mapping[tuple[int, float], Sequence[Round]]) -> Iterator[Figure]:
    """Yield the figures of all rounds by (number of ranks, ratio)."""
    from benchmarks.loss_prefetch import TARGET

    for (ranks, ratio), rounds in found.items():
        name = f"{ranks} ranks, score/train {ratio:g}: step / max(train, score)"
        yield Figure(name, Spread.of([one.step / one.bound for one in rounds]), "x", TARGET, False)


def _train_together(
    bench: Bench, ranks: int, batch: int, steps: int, queries: list[str], documents: list[str], quick: bool
) -> Iterator[Round]:
    """Start the ranks, wait for their end, and yield what rank 0 measured."""
    from benchmarks.loss_prefetch import paced_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory, ExitStack() as stack:
        address = stack.enter_context(paced_server(bench, Path(directory)))
        job = Path(directory) / "job.json"
        job.write_text(
            json.dumps(
                {
                    "address": address,
                    "directory": directory,
                    "queries": queries,
                    "documents": documents,
                    "batch": batch,
                    "steps": steps,
                    "ratios": _QUICK_RATIOS if quick else RATIOS,
                    "rounds": min(bench.rounds, _ROUNDS),
                    "pass_seconds": _QUICK_PASS_SECONDS if quick else _PASS_SECONDS,
                }
            ),
            encoding="utf-8",
        )
        children = [
            stack.enter_context(bench.launcher.rank(job, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(ranks)
        ]
        children[0].wait_for("^ended$", _MAXIMUM_SECONDS, goal="it had measured everything")
        for line in children[0].lines:
            if line.startswith(_RESULT):
                yield Round(**json.loads(line.removeprefix(_RESULT)))


def _run_rank(job: dict[str, Any]) -> None:
    """Train and measure as one rank; rank 0 prints the results."""
    import torch
    import torch.distributed as dist

    from benchmarks.loss_accumulation import sleep_in_passes
    from benchmarks.loss_prefetch import Training, small_student
    from loss_client import RerankerClient

    dist.init_process_group("gloo")
    ranks, first = dist.get_world_size(), dist.get_rank() == 0

    def slowest(seconds: float) -> float:
        """Return the longest time of all ranks."""
        longest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return float(longest)

    model = small_student()
    sleep_in_passes(model, job["pass_seconds"])
    batch, steps = job["batch"], job["steps"]
    together = batch * ranks
    with RerankerClient(job["address"]) as client:
        training = Training(model, client, job["queries"], job["documents"], batch, Path(job["directory"]))
        for mode in ("prefetch", "alone"):  # the first training is a warm-up
            usual = slowest(training.run(mode, steps, _SKIPPED_STEPS, gather=True).seconds)
        for _ in range(job["rounds"]):
            for ratio in job["ratios"]:
                alone = slowest(training.run("alone", steps, _SKIPPED_STEPS, gather=True).seconds)
                if first:
                    training.set_rate(together * together / (ratio * usual))
                dist.barrier()
                began = time.perf_counter()
                own = job["queries"][batch * dist.get_rank() :][:batch]
                client.stream_grid(own, job["documents"][:together]).result()
                score = slowest(time.perf_counter() - began)
                step = slowest(training.run("prefetch", steps, _SKIPPED_STEPS, gather=True).seconds)
                if first:
                    print(_RESULT + json.dumps(asdict(Round(ranks, ratio, alone, score, step))), flush=True)
    dist.barrier()
    if first:
        print("ended", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    prepare_process()
    _run_rank(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
