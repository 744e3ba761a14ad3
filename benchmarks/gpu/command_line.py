"""Command line of the benchmark on a GPU; see the package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.gpu import formats, loss, shapes
from benchmarks.gpu.run import Benchmark, Machine
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.table import table

_SMALL = ("MiniLM-L6", "ettin-17m")
"""Shapes of the part "formats" on a CPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts and shapes that were asked for; print what comes out, and write it as JSON lines.

    Args:
        arguments: Arguments of the command line; ``None`` for those of this process.
    """
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parts = ("speed", "formats", "loss")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, help="parts to measure")
    parser.add_argument("--shape", nargs="+", choices=names, help="shapes to measure; default: all")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("bfloat16", "float16", "float32"),
        default=["bfloat16"],
        help="number formats of the part speed",
    )
    parser.add_argument("--engine", nargs="*", choices=("torch", "vllm"), default=["torch", "vllm"], help="our engines")
    parser.add_argument(
        "--model",
        nargs="+",
        type=Path,
        default=[],
        help="part formats: directories of trained models, measured instead of shapes, such as the cross-encoder that "
        "`make quality` leaves in bench-results/quality",
    )
    parser.add_argument(
        "--rows", type=int, help="part formats: anchors, and documents; default: 64 for trained models, 32 on a CPU"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models of the same families, to rehearse on a CPU")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for results and logs")
    options = parser.parse_args(arguments)
    console = Console(width=150)
    machine = Machine.here()
    on_cpu = machine.device.type == "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [shape for shape in SHAPES if shape.name in (options.shape or names)]

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    def keep(name: str, record: dict[str, object]) -> None:
        with (options.output / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    if not on_cpu:
        say(f"{machine.name}; a matrix product in bfloat16 reaches {machine.peak / 1e12:.0f} TFLOP/s")
    elif not options.tiny and set(options.part) - {"formats"}:
        say("Speed and loss skipped: this machine has no CUDA GPU. --tiny rehearses them on a CPU.")
        options.part = [part for part in options.part if part == "formats"]
    if "speed" in options.part:
        benchmark = Benchmark(machine, options.output, say, options.tiny)
        records = []
        for shape in chosen:
            records += benchmark.measure(shape, options.dtype, options.engine)
        console.print(table(records))
    if "loss" in options.part:
        batch = 16 if options.tiny else 256
        for shape in chosen[:2]:
            record = loss.measure(shape, options.output, batch=batch, rehearsal=options.tiny, say=say)
            keep("gpu-loss.jsonl", record)
    if options.model:
        for record in formats.measure_trained(options.model, rows=options.rows or 64, engines=options.engine, say=say):
            keep("formats.jsonl", record)
    elif "formats" in options.part:
        if options.tiny:
            chosen = [shapes.tiny(shape) for shape in chosen]
        elif on_cpu and options.shape is None:
            chosen = [shape for shape in chosen if shape.name in _SMALL]
        rows = options.rows or (8 if options.tiny else 32 if on_cpu else 128)
        for record in formats.measure(chosen, machine.device, rows=rows, engines=options.engine, say=say):
            keep("formats.jsonl", record)
