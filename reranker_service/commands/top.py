"""Command ``reranker-service top``: a live table of running servers, from their metrics pages."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .access import Access, AccessError, add_arguments

if TYPE_CHECKING:
    from rich.table import Table

    from .page import Figures, Page

_COLUMNS = ("server", "state", "model", "pairs/s", "cache", "queue", "oldest", "engine", "busy", "streams", "held")
_BUSY_READINGS = 30
_PIPE_WIDTH = 160
_ERROR_LENGTH = 60
# Narrower terminals do without the model and the memory.
_FULL_WIDTH = 100

DESCRIPTION = f"""\
Show running servers in a table that is renewed each second: one row for each address, read from the metrics page of
the server (--metrics-port). Ctrl-C ends it.

  reranker-service top localhost:9400
  reranker-service top gpu1:9400 gpu2:9400 --once

pairs/s   pairs in replies a second, since the last reading
cache     share of these pairs whose score came from the server's cache
queue     sequences (pairs; for a bi-encoder texts) that wait for the engine
oldest    time that the oldest waiting job has waited
engine    sequences inside the engine
busy      share of the last {_BUSY_READINGS} readings that found work inside the engine
streams   open streams
held      memory that is held for clients (--memory-bytes is its limit)

Terminals of less than 100 columns show neither model nor held.
"""


class _Server:
    """Readings of one server's page."""

    def __init__(self, address: str, access: Access) -> None:
        self.address = address
        self.error: str | None = None
        self.figures: Figures | None = None
        self._access = access
        self._last: Page | None = None
        self._busy: deque[bool] = deque(maxlen=_BUSY_READINGS)

    @property
    def busy_share(self) -> float:
        """Share of the readings that found work inside the engine."""
        return sum(self._busy) / len(self._busy)

    def read(self) -> None:
        """Read the page. Figures are there after the second reading.

        Raises:
            AccessError: The address or the flags for TLS and tokens are wrong.
        """
        from .page import figures, parse

        try:
            now = parse(self._access.get(self.address))
        except AccessError:
            raise
        except (OSError, ValueError) as error:
            self.error, self.figures, self._last = str(error), None, None
            return
        self.error = None
        self._busy.append(now.sums.get("engine_sequences", 0.0) > 0)
        if self._last is not None:
            self.figures = figures(self._last, now)
        self._last = now


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the table.

    Args:
        arguments: Arguments of the command line, without the word "top"; ``None`` for those of this process.

    Returns:
        0; with ``--once``, 1 if a server's page could not be read. 1 if a package is missing. Wrong arguments exit
        with 2.
    """
    parser = argparse.ArgumentParser(
        prog="reranker-service top", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "addresses", nargs="+", metavar="ADDRESS", help="HOST:PORT of --metrics-port; https://HOST:PORT for TLS"
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="time between two readings; default: 1"
    )
    parser.add_argument("--once", action="store_true", help="print one table, after two readings, and end")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if not options.interval > 0:
        parser.error(f"--interval is {options.interval:g}; it has to be above 0")
    if missing := [name for name in ("rich", "prometheus_client") if find_spec(name) is None]:
        print(
            f"reranker-service top needs {' and '.join(missing)}: pip install 'reranker-grpc[top]'",
            file=sys.stderr,
        )
        return 1
    try:
        access = Access.of(options)
        servers = [_Server(address, access) for address in options.addresses]
        return _show(servers, options.interval, options.once)
    except AccessError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 0


def _show(servers: Sequence[_Server], interval: float, once: bool) -> int:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with ThreadPoolExecutor(len(servers)) as threads:

        def read() -> None:
            list(threads.map(_Server.read, servers))

        read()
        if once:
            time.sleep(interval)
            read()
            # Without a terminal rich assumes 80 columns and cuts the cells.
            wide = console if console.is_terminal else Console(width=_PIPE_WIDTH)
            wide.print(_table(servers, wide.width))
            return int(any(server.error for server in servers))
        with Live(_table(servers, console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                read()
                live.update(_table(servers, console.width), refresh=True)


def _table(servers: Sequence[_Server], width: int) -> Table:
    from rich import box
    from rich.table import Table

    columns = [*_COLUMNS] if width >= _FULL_WIDTH else [name for name in _COLUMNS if name not in ("model", "held")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        text = name in ("server", "state", "model")
        table.add_column(name, justify="left" if text else "right", no_wrap=True, overflow="ellipsis")
    for server in servers:
        cells = {"server": server.address, **_cells(server)}
        table.add_row(*(cells.get(name, "") for name in columns))
    return table


def _cells(server: _Server) -> dict[str, str]:
    if server.error is not None:
        return {"state": f"[red]{_cut(server.error)}[/red]"}
    found = server.figures
    if found is None:
        return {"state": "reading"}
    return {
        "state": found.state if found.state == "serving" else f"[yellow]{found.state}[/yellow]",
        "model": found.model,
        "pairs/s": f"{found.pairs_per_second:,.0f}",
        "cache": "" if found.cached_share is None else f"{found.cached_share:.0%}",
        "queue": f"{found.waiting:,}",
        "oldest": f"{found.oldest_seconds:.1f} s",
        "engine": f"{found.running:,}",
        "busy": f"{server.busy_share:.0%}",
        "streams": f"{found.streams:,}",
        "held": f"{found.held_bytes / 2**20:,.0f} MiB",
    }


def _cut(text: str) -> str:
    from rich.markup import escape

    text = text.removeprefix("<urlopen error ").removesuffix(">")
    return escape(text if len(text) <= _ERROR_LENGTH else f"{text[: _ERROR_LENGTH - 1]}…")
