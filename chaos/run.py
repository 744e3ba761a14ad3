"""Run: the servers, clients, jobs and counts of one fault, and the sizes that they have."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.jobs import Jobs
from chaos.ledger import Ledger
from chaos.report import Outcome
from chaos.servers import Server
from loss_client import RerankerClient

TIMEOUT_SECONDS = 60.0
"""Most seconds that a job may go without finished work."""
STALL_SECONDS = 2.0
"""Most seconds that a server may send nothing."""


class SkippedError(RuntimeError):
    """A fault cannot be injected here; the message says why."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        times: How often each fault is injected, at least.
        side: Queries, and documents, of a job.
        rate: Pairs that one server scores in a second.
        steps: Training steps.
        fault_seconds: Most seconds of one fault, after which no more of it is injected.
        pace: Factor of the pauses between faults.
    """

    times: int = 20
    side: int = 448  # 200,704 pairs
    rate: float = 20_000.0
    steps: int = 500
    fault_seconds: float = 240.0
    pace: float = 1.0


QUICK = Sizes(times=2, side=128, rate=8_000.0, steps=20, fault_seconds=20.0, pace=0.5)
"""Sizes for tests: small jobs and few injections."""


@dataclass(slots=True)
class Injections:
    """Counts injections.

    Attributes:
        wanted: How many are wanted.
        seconds: Time after the first one after which no more are begun.
        done: How many there were.
    """

    wanted: int
    seconds: float
    done: int = 0
    _until: float | None = None

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each injection, until there were enough, or time is over."""
        while self.done < self.wanted and self.go_on():
            self.done += 1
            yield self.done - 1

    def go_on(self) -> bool:
        """Tell whether there is time for more injections; the time begins with the first call."""
        now = time.monotonic()
        self._until = self._until or now + self.seconds
        return now < self._until

    def undo(self) -> None:
        """Take the present injection back: it had no effect."""
        self.done -= 1


@dataclass(slots=True)
class Run:
    """One fault, injected while jobs run.

    Attributes:
        sizes: Sizes.
        model: Directory of the model that servers serve.
        directory: Directory for files of this run.
        ledger: Counts what callers see.
        servers: All servers so far.
        injections: Counts injections.
    """

    sizes: Sizes
    model: Path
    directory: Path
    ledger: Ledger = field(default_factory=Ledger)
    servers: list[Server] = field(default_factory=list)
    injections: Injections = field(init=False)
    _begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.injections = Injections(self.sizes.times, self.sizes.fault_seconds)

    @contextmanager
    def serving(self, count: int, *flags: str, rate: float | None = None) -> Iterator[list[Server]]:
        """Run ``count`` servers as long as the context lasts; ``rate`` overrides that of the sizes."""
        with ExitStack() as stack:
            servers = [Server(self.model, self.directory, rate or self.sizes.rate, flags=flags) for _ in range(count)]
            self.servers += servers
            for server in servers:
                stack.enter_context(server)
            for server in servers:
                server.wait_ready()
            yield servers

    def client(self, servers: Sequence[Server | str], **options: Any) -> RerankerClient:
        """Make a client of servers, or of addresses."""
        addresses = [server.address if isinstance(server, Server) else server for server in servers]
        return RerankerClient(addresses, **{"timeout": TIMEOUT_SECONDS, "stall_timeout": STALL_SECONDS, **options})

    @contextmanager
    def jobs(self, servers: Sequence[Server | str], parallel: int = 2, **options: Any) -> Iterator[RerankerClient]:
        """Run jobs as long as the context lasts, and finish them at its end; gives their client."""
        with self.client(servers, **options) as client:
            with Jobs(client, self.ledger, self.sizes.side, parallel=parallel):
                yield client

    def busiest(self, servers: Sequence[Server]) -> Server:
        """Return the server that scores most pairs at present."""
        before = [server.scored for server in servers]
        self.pause(0.1, 0.3)
        return max(servers, key=lambda server: server.scored - before[servers.index(server)])

    def pause(self, least: float, most: float) -> None:
        """Let jobs run for a random time, in seconds."""
        time.sleep(random.SystemRandom().uniform(least, most) * self.sizes.pace)

    def outcome(self, fault: str) -> Outcome:
        """Return the counts of the run."""
        return Outcome(
            fault,
            wanted=self.injections.wanted,
            injected=self.injections.done,
            ledger=self.ledger,
            scored=sum(server.scored for server in self.servers),
            seconds=time.monotonic() - self._begun,
        )
