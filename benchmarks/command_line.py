"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType


def parse(
    description: str | None,
    parts: Sequence[str],
    quick: str,
    apart: Sequence[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """Parse this process's arguments, and make SIGTERM end the process in order.

    Args:
        description: Text of ``--help``.
        parts: Parts that ``--only`` can name.
        quick: Help of ``--quick``.
        apart: Parts that ``--only`` can name as well, and that are not measured without it.
        flags: More flags without a value, by name, with their help.

    Returns:
        ``quick``, ``only`` (names of parts), ``output`` (a path), and the other flags.
    """
    # As an exception, SIGTERM leaves the with blocks in order, which end the processes that were started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", nargs="+", choices=(*parts, *apart), default=tuple(parts), help="parts to measure")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for results and logs")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()
