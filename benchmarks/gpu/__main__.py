"""Command line of the benchmark on a GPU; see the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks.gpu import formats, loss, shapes
from benchmarks.gpu.run import Benchmark, Machine
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.table import table


def main() -> None:
    """Measure the shapes that were asked for, and print a table."""
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=("speed", "formats", "loss"), default=["speed", "formats", "loss"])
    parser.add_argument("--shape", nargs="+", choices=names, default=names, help="shapes to measure")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--engine", nargs="*", choices=("torch", "vllm"), default=["torch", "vllm"])
    parser.add_argument("--tiny", action="store_true", help="tiny models of the same families, to rehearse on a CPU")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for results and logs")
    arguments = parser.parse_args()
    console = Console(width=150)
    machine = Machine.here()
    if machine.device.type == "cpu" and not arguments.tiny:
        console.print("Skipped: this machine has no CUDA GPU. --tiny rehearses the benchmark on a CPU.")
        return
    console.print(f"{machine.name}; a matrix product in bfloat16 reaches {machine.peak / 1e12:.0f} TFLOP/s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = [shape for shape in SHAPES if shape.name in arguments.shape]

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    def keep(name: str, record: dict[str, object]) -> None:
        with (arguments.output / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    if "speed" in arguments.part:
        benchmark = Benchmark(machine, arguments.output, say, arguments.tiny)
        records = []
        for shape in chosen:
            records += benchmark.measure(shape, arguments.dtype, arguments.engine)
        console.print(table(records))
    if "loss" in arguments.part:
        for shape in chosen[:2]:
            for record in loss.measure(
                shape, arguments.output, batch=16 if arguments.tiny else 256, rehearsal=arguments.tiny, say=say
            ):
                keep("gpu-loss.jsonl", record)
    if "formats" in arguments.part:
        small = [shapes.tiny(shape) for shape in chosen] if arguments.tiny else chosen
        rows = 16 if arguments.tiny else 128
        for record in formats.measure(small, machine.device, rows=rows, engines=arguments.engine, say=say):
            keep("gpu-formats.jsonl", record)


if __name__ == "__main__":
    main()
