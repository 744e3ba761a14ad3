"""Command line of fuzzing and load: ``python -m tests.fuzz``; prints a line for each part, exits 1 after a fault."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import models
from . import frames, load, messages, scripts
from .target import HEALTH_SECONDS, MIB, Target

MESSAGES_GROWTH = 48 * MIB
"""Bound of the growth of the server's memory while all RPCs are fuzzed."""
# 64 clients that always wait for a reply keep one event loop busy: a health check waits for its turn among their calls.
_LOAD_PART = 3


def main() -> int:
    """Run the parts that were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Attack a server of this machine.")
    parser.add_argument("--messages", type=int, default=100_000, help="mutated messages for each RPC")
    parser.add_argument("--scripts", type=int, default=10_000, help="hostile but valid stream scripts")
    parser.add_argument("--frames", type=float, default=1.0, help="part of each attack with HTTP/2 frames")
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of load")
    parser.add_argument(
        "--health-seconds",
        type=float,
        default=HEALTH_SECONDS,
        help="longest time of a health check; under load three times as long",
    )
    parser.add_argument("--seed", type=int, default=messages.SEED, help="seed of all parts")
    parts: dict[str, Callable[[Path, argparse.Namespace], None]] = {
        "messages": _messages,
        "scripts": _scripts,
        "frames": _frames,
        "load": _load,
    }
    parser.add_argument("--only", choices=parts, help="the only part to run")
    arguments = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        model = models.build_bert_cross_encoder(Path(directory) / "cross-encoder")
        for name, part in parts.items():
            if arguments.only in (None, name):
                try:
                    part(model, arguments)
                except Exception:
                    traceback.print_exc()
                    failed.append(name)
    print(f"FAULTS in {', '.join(failed)}" if failed else "no fault", flush=True)
    return int(bool(failed))


@contextmanager
def _timed(what: str) -> Iterator[list[str]]:
    """Print a line with the notes that the context adds, and how long it took."""
    notes: list[str] = []
    began = time.monotonic()
    yield notes
    print(f"{what:<28}{'  '.join(notes)}  {time.monotonic() - began:.0f} s", flush=True)


def _messages(model: Path, arguments: argparse.Namespace) -> None:
    with Target(model) as target:
        for name in messages.RPCS:
            asyncio.run(messages.fuzz(target, name, range(-500, 0), arguments.seed))
        target.check_scores()
        with target.watched() as watch:
            for name in messages.RPCS:
                with _timed(name) as notes:
                    codes = asyncio.run(messages.fuzz(target, name, range(arguments.messages), arguments.seed))
                    target.check_scores()
                    notes += [f"{code.name} {count}" for code, count in codes.most_common()]
                    notes.append(f"growth {(target.resident() - watch.before) / MIB:.1f} MiB")
        watch.check(MESSAGES_GROWTH, arguments.health_seconds)
        target.settle()
        print(f"{'messages':<28}slowest health check {watch.slowest:.2f} s  growth {watch.growth / MIB:.1f} MiB")


def _scripts(model: Path, arguments: argparse.Namespace) -> None:
    with Target(model, *scripts.FLAGS) as target, _timed("scripts") as notes:
        with target.watched() as watch:
            notes.append(str(scripts.run(target, arguments.scripts, arguments.seed)))
        watch.check(MESSAGES_GROWTH, arguments.health_seconds)
        target.settle()
        notes += [f"slowest health check {watch.slowest:.2f} s", f"growth {watch.growth / MIB:.1f} MiB"]


def _frames(model: Path, arguments: argparse.Namespace) -> None:
    with Target(model) as target:
        target.check_scores()
        before, files = target.resident(), target.open_files()
        for name in frames.ATTACKS:
            with _timed(name) as notes:
                watch = frames.run(target, name, arguments.seed, arguments.frames, arguments.health_seconds)
                notes += [f"slowest health check {watch.slowest:.2f} s", f"growth {watch.growth / MIB:.1f} MiB"]
        target.settle()
        left = target.open_files() - files
        assert left <= load.FILES_LEFT, f"{left} open files are left"
        print(f"{'frames':<28}growth {(target.resident() - before) / MIB:.1f} MiB in all  open files left {left}")


def _load(model: Path, arguments: argparse.Namespace) -> None:
    with Target(model, *load.FLAGS) as target, _timed("load") as notes:
        report = load.run(
            target, seconds=arguments.seconds, seed=arguments.seed, health=_LOAD_PART * arguments.health_seconds
        )
        ended = ", ".join(f"{rpc} {code} {count}" for (rpc, code), count in sorted(report.calls.items()))
        notes += [f"{sum(report.calls.values())} calls ({ended})", f"{report.pairs} scores right"]
        notes += [f"slowest health check {report.slowest:.2f} s", f"growth {report.growth / MIB:.1f} MiB"]
        notes += [
            f"drift {report.drift / MIB:.1f} MiB",
            f"open files {report.files[0]} before, {report.files[1]} after",
        ]


if __name__ == "__main__":
    sys.exit(main())
