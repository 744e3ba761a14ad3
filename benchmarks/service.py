"""Benchmark of the service: figures and their targets, as a table, a plot and a JSON file.

python -m benchmarks.service [--quick] [--only PART ...] [--output DIRECTORY]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from benchmarks import causal, latency, models, overhead, report, throughput
from benchmarks.bench import Bench
from benchmarks.command_line import parse
from benchmarks.gpu.command_line import main as on_gpu
from benchmarks.launch import Launcher, Machine
from benchmarks.report import Figure
from benchmarks.texts import Corpus

PARTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "torch-minilm": partial(throughput.on_torch, model="minilm"),
    "torch-tiny": partial(throughput.on_torch, model="tiny"),
    "vllm-minilm": partial(throughput.on_vllm, model="minilm"),
    "vllm-tiny": partial(throughput.on_vllm, model="tiny"),
    "instant": overhead.instant_engine,
    "once": overhead.once_per_text,
    "causal": causal.prefix_cache,
    "priority": latency.with_torch,
}
"""Parts that can be measured alone."""

APART = {"gpu": ("speed", "loss"), "formats": ("formats",)}
"""Parts of the benchmark on a GPU, by their names here; measured only if they are named."""

# Seconds of each part, starts of processes included, on two cores that score about 70 pairs/s with MiniLM's size.
_SECONDS = {
    "torch-minilm": 85.0,
    "torch-tiny": 65.0,
    "vllm-minilm": 115.0,
    "vllm-tiny": 140.0,
    "instant": 40.0,
    "once": 20.0,
    "causal": 65.0,
    "priority": 45.0,
}
_LIMIT_SECONDS = 580.0
_LEAST_SCALE = 0.1


def build_models(directory: Path, machine: Machine, corpus: Corpus, names: Sequence[str]) -> dict[str, Path]:
    """Write the models that the named parts need below ``directory``; return their paths by name."""
    built = {
        "minilm": models.build_cross_encoder(directory / "minilm", models.MINILM),
        "tiny": models.build_cross_encoder(directory / "tiny", models.TINY),
        "all-minilm": models.all_minilm(),
    }
    if "causal" in names:
        shape = models.QWEN_DECODER if machine.cuda else models.SMALL_DECODER
        built["causal"] = models.build_causal_reranker(directory / "causal", shape, corpus.texts())
    return built


def scale_for(names: Sequence[str], elapsed: float) -> float:
    """Return the share of their usual time that the remaining parts may take, so that all of them end within the limit.

    On a slower machine each part measures less instead of taking longer.

    Args:
        names: Parts that are left.
        elapsed: Seconds since the start of the run.
    """
    return min(1.0, max(_LEAST_SCALE, (_LIMIT_SECONDS - elapsed) / sum(_SECONDS[name] for name in names)))


def run(
    names: Sequence[str], *, output: Path, rounds: int = 5, scale: float = 1.0, console: Console | None = None
) -> list[Figure]:
    """Measure the named parts; write ``service.json`` after each part and ``service.png`` at the end into ``output``.

    Args:
        names: Names from ``PARTS``.
        output: Directory for results and logs; created if it is missing.
        rounds: Number of rounds behind every figure.
        scale: Share of a full run's time (about ten minutes) to spend, in (0, 1].
        console: Console for progress and the table.
    """
    console = console or Console()
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    figures: list[Figure] = []
    machine = Machine.here()
    silence: Any = logging.disable_progress_bar
    silence()
    corpus = Corpus()
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory:
        paths = build_models(Path(directory), machine, corpus, names)
        bench = Bench(
            Launcher(machine, logs), corpus, paths, rounds, scale, lambda line: console.print(f"[dim]  {line}[/]")
        )
        for position, name in enumerate(names):
            elapsed = time.monotonic() - began
            console.print(f"[bold]{name}[/]  [dim]after {elapsed:.0f} s[/]")
            figures += PARTS[name](replace(bench, scale=scale * scale_for(names[position:], elapsed)))
            report.write(output / "service.json", figures)
    report.draw(output / "service.png", figures)
    console.print(report.table(figures))
    where = "a GPU" if machine.cuda else f"{len(machine.cores)} cores"
    console.print(
        f"{time.monotonic() - began:.0f} s on {where}, {machine.dtype}; {rounds} rounds; results are in "
        f"{output / 'service.json'}, the plot in {output / 'service.png'}"
    )
    return figures


def main() -> None:
    """Run the benchmark from the command line."""
    quick = "3 rounds of a fifth of the time, too short for figures"
    arguments = parse(__doc__, tuple(PARTS), quick, apart=tuple(APART))
    rounds, scale = (3, 0.2) if arguments.quick else (5, 1.0)
    if parts := [part for name in arguments.only for part in APART.get(name, ())]:
        on_gpu(["--part", *parts, "--output", str(arguments.output)])
    if names := [name for name in arguments.only if name in PARTS]:
        run(names, output=arguments.output, rounds=rounds, scale=scale)


if __name__ == "__main__":
    main()
