"""Faults of servers and connections: each function injects one of them while jobs run."""

from __future__ import annotations

import logging
import signal
import time

from chaos.cutting import CuttingProxy
from chaos.ledger import Ledger
from chaos.run import STALL_SECONDS, Run
from chaos.servers import Server

_CUTTING_SECONDS = 2.0  # for each cut that is wanted
_PAIR_BYTES = 5  # on the wire, texts and messages included
_REPORT_SECONDS = 30.0


def killed_servers(run: Run) -> None:
    """Kill the busier of two servers, and start it again."""
    with run.serving(2) as servers, run.jobs(servers):
        for _ in run.injections:
            run.busiest(servers).restart(signal.SIGKILL)
            run.pause(0.2, 1.5)


def paused_servers(run: Run) -> None:
    """Stop the busier of two servers for longer than the client's stall limit, and let it go on."""
    with run.serving(2) as servers, run.jobs(servers):
        for _ in run.injections:
            process = run.busiest(servers).process
            process.pause()
            time.sleep(STALL_SECONDS * 1.5)
            process.resume()
            run.pause(0.2, 1.5)


def rolling_restarts(run: Run) -> None:
    """Restart three servers one after the other with SIGTERM; one round of all three is one injection."""
    with run.serving(3, "--graceful-timeout", "1") as servers, run.jobs(servers):
        for _ in run.injections:
            for server in servers:
                _restart_in_order(server, run.ledger)
            run.pause(0.2, 1.0)


def terminated_servers(run: Run) -> None:
    """Restart the busier of two servers with SIGTERM while both have more jobs than they can do."""
    with run.serving(2, "--graceful-timeout", "0.5") as servers, run.jobs(servers, parallel=4):
        for _ in run.injections:
            _restart_in_order(run.busiest(servers), run.ledger)
            run.pause(0.2, 1.0)


def _restart_in_order(server: Server, ledger: Ledger) -> None:
    status = server.restart(signal.SIGTERM)
    if status:
        ledger.error(f"the server ended with status {status} after SIGTERM")


def cut_connections(run: Run) -> None:
    """Cut connections after random numbers of bytes."""
    with run.serving(2) as servers:
        first, second = (CuttingProxy(server.address, _PAIR_BYTES * run.sizes.side**2) for server in servers)
        with first, second:
            with run.jobs([first.address, second.address]):
                time.sleep(_CUTTING_SECONDS * run.injections.wanted)
                while (cuts := first.cuts + second.cuts) < run.injections.wanted and run.injections.go_on():
                    run.pause(0.1, 0.1)
                first.stop_cutting()
                second.stop_cutting()
            run.injections.done = cuts


class _Reports(logging.Handler):
    """Counts the client's warnings that a server of another model is left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "is left out" in record.getMessage():
            self.count += 1


def other_models(run: Run) -> None:
    """Replace one of three servers by one of another model, and later back.

    Each other model is a new one, and the client must report it before it goes.
    """
    logger, reports = logging.getLogger("loss_client"), _Reports()
    logger.addHandler(reports)
    try:
        with run.serving(3) as servers, run.jobs(servers, parallel=3):
            for number in run.injections:
                server = run.busiest(servers)
                server.seed = 1 + number
                before = reports.count
                server.restart(signal.SIGKILL)
                until = time.monotonic() + _REPORT_SECONDS
                while reports.count == before and time.monotonic() < until:
                    run.pause(0.1, 0.1)
                if reports.count == before:
                    run.ledger.error(
                        f"the model with the seed {server.seed} was not reported within {_REPORT_SECONDS:.0f} s"
                    )
                server.seed = 0
                server.restart(signal.SIGTERM)
    finally:
        logger.removeHandler(reports)
    run.ledger.note("reports", reports.count)
