"""Benchmark of one job at many servers: pairs a second over (servers x the speed of one server).

Real server processes have an engine of fixed speed that uses no processor time, so that this machine is not the limit.
The scores have a closed form, and every score is checked.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from benchmarks.bench import Bench
from benchmarks.report import Figure, save_svg
from benchmarks.rounds import Spread
from chaos import model
from chaos.ledger import CountedMatrix, Ledger, counted_matrices
from chaos.scores import raw_scores, texts_of
from chaos.servers import Server, free_port
from loss_client import RerankerClient, RerankerError
from loss_client.client import names

RATE = 500.0
"""Pairs that one server scores in a second; 16 servers then take a fraction of a core, with their client."""
COUNTS = (1, 2, 4, 8, 16)
_QUICK_COUNTS = (1, 2)
_SECONDS = 12.0
_QUICK_SECONDS = 2.0
_CHANGING_SECONDS = 9.0  # least time of a job whose servers change
_TARGET = 0.95
_FOLLOW_SECONDS = 2.0
# Share of the speed of all servers that counts as reached, over one second of chunks that come one by one.
_REACHED = 0.9
_WINDOW_SECONDS = 1.0
_TICK_SECONDS = 0.05
_WATCHED_CHUNK_PAIRS = 32
_HOST = "servers.test"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Curve:
    """Pairs with a score over time.

    Attributes:
        times: Seconds since the job began.
        pairs: Pairs with a score at these times.
    """

    times: NDArray[np.float64]
    pairs: NDArray[np.float64]

    def rate(self, begin: float, end: float) -> float:
        """Pairs a second between two times."""
        at = np.interp([begin, end], self.times, self.pairs)
        return float(at[1] - at[0]) / (end - begin)

    def seconds_until(self, rate: float, begin: float, end: float) -> float:
        """Seconds from ``begin`` until every second up to ``end`` has a rate; all the time if the last one has not."""
        begins = np.arange(begin, end - _WINDOW_SECONDS, _TICK_SECONDS)
        slow = [one for one in begins if self.rate(one, one + _WINDOW_SECONDS) < rate]
        return float(slow[-1] - begin) + _TICK_SECONDS if slow else 0.0


def servers_figures(bench: Bench, plot: Path) -> list[Figure]:
    """Measure one job at 1 to 16 servers, with one at half the speed, and with one killed and one added meanwhile.

    Args:
        bench: The run.
        plot: File for the plot, SVG.
    """
    quick = bench.scale < 1
    counts, seconds = (_QUICK_COUNTS, _QUICK_SECONDS) if quick else (COUNTS, _SECONDS)
    ledger = Ledger()
    shares: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as name, counted_matrices():
        directory = Path(name)
        served = model.build(directory / "model")
        with _servers(served, directory, max(counts)) as servers:
            for number in range(bench.rounds):
                alone = 0.0
                for count in counts:
                    with RerankerClient([server.address for server in servers[:count]]) as client:
                        score(client, ledger, 0.2 * RATE * count)  # connections, and the models' fingerprints
                        rate = score(client, ledger, seconds * RATE * count)
                    alone = alone or rate
                    shares[count].append(rate / (count * alone))
                    bench.say(f"round {number + 1}: {count} servers, {rate:,.0f} pairs/s, {shares[count][-1]:.3f}")
        half = [_half(served, directory, ledger, seconds, bench) for _ in range(bench.rounds)]
        changes = [
            _changes(served, directory, ledger, max(seconds, _CHANGING_SECONDS), bench) for _ in range(bench.rounds)
        ]
    draw(plot, shares, changes[-1])
    return list(figures(shares, half, changes, ledger))


@dataclass(frozen=True, slots=True)
class Changes:
    """One job of three servers, of which one is killed, and a fourth is added.

    Attributes:
        curve: Pairs over time.
        killed: Seconds from the job's beginning until one was killed.
        added: Seconds until one was added.
    """

    curve: Curve
    killed: float
    added: float

    @property
    def followed(self) -> tuple[float, float]:
        """Seconds until the rate of the servers that are left, and of those and the added one, was reached for good."""
        after_kill = self.curve.seconds_until(_REACHED * 2 * RATE, self.killed, self.added)
        return after_kill, self.curve.seconds_until(_REACHED * 3 * RATE, self.added, float(self.curve.times[-1]))


def figures(
    shares: dict[int, list[float]], half: Sequence[float], changes: Sequence[Changes], ledger: Ledger
) -> Iterator[Figure]:
    """Yield the figures.

    Args:
        shares: Pairs a second over (servers x one server's), of each round, by the number of servers.
        half: The same for four servers of which one has half the speed.
        changes: The jobs whose servers changed.
        ledger: Counts of all scores.
    """
    for count, found in shares.items():
        if count > 1:
            yield Figure(f"{count} servers: pairs/s over {count} x one server's", Spread.of(found), "x", _TARGET)
    yield Figure("4 servers, one at half speed: pairs/s over 3.5 x one server's", Spread.of(half), "x", _TARGET)
    for place, name in enumerate(("one of 3 killed", "one added to 2")):
        found = [one.followed[place] for one in changes]
        yield Figure(f"{name}: time until 90% of the new speed", Spread.of(found), "s", _FOLLOW_SECONDS, False)
    wrong = float(ledger.wrong + ledger.missing + ledger.twice + len(ledger.errors))
    yield Figure(f"wrong, missing and repeated of {ledger.asked:,} scores", Spread(wrong, wrong, wrong), "scores")


@contextmanager
def _servers(served: Path, directory: Path, count: int, rate: float = RATE) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(served, directory, rate)) for _ in range(count)]
        for server in servers:
            server.wait_ready()
        yield servers


def _half(served: Path, directory: Path, ledger: Ledger, seconds: float, bench: Bench) -> float:
    with _servers(served, directory, 3) as full, _servers(served, directory, 1, RATE / 2) as half:
        with RerankerClient([full[0].address]) as client:
            alone = score(client, ledger, seconds / 2 * RATE)
        with RerankerClient([server.address for server in (*full, *half)]) as client:
            score(client, ledger, 0.2 * RATE * 4)
            share = score(client, ledger, seconds * 3.5 * RATE) / (3.5 * alone)
    bench.say(f"4 servers, one at half speed: {share:.3f}")
    return share


def _changes(served: Path, directory: Path, ledger: Ledger, seconds: float, bench: Bench) -> Changes:
    """Kill one of three servers behind a host name after a third of the time, and add another after two thirds."""
    port = free_port()
    hosts = [f"127.0.0.{number}" for number in range(1, 5)]
    servers = [Server(served, directory, RATE, flags=("--host", host, "--port", str(port))) for host in hosts]
    found = hosts[:3]

    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(0)
        return list(found)

    times: list[float] = []
    with ExitStack() as stack, mock.patch.object(names, "resolve_host", resolve):
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            server.wait_ready()
        client = stack.enter_context(RerankerClient(f"{_HOST}:{port}"))
        score(client, ledger, 0.2 * RATE * 3)

        def change() -> None:
            time.sleep(seconds / 3)
            times.append(time.monotonic())
            servers[0].end(signal.SIGKILL)
            time.sleep(seconds / 3)
            times.append(time.monotonic())
            found.append(hosts[3])

        changing = threading.Thread(target=change)
        begun = time.monotonic()
        changing.start()
        curves: list[Curve] = []
        score(client, ledger, seconds * 2.7 * RATE, curves.append)
        changing.join()
    made = Changes(curves[0], times[0] - begun, times[1] - begun)
    bench.say("one killed: {:.2f} s, one added: {:.2f} s until the new speed".format(*made.followed))
    return made


def score(
    client: RerankerClient, ledger: Ledger, pairs: float, watch: Callable[[Curve], object] | None = None
) -> float:
    """Run a grid of about ``pairs`` pairs, count its scores and return pairs a second; ``watch`` gets the curve."""
    side = max(int(pairs**0.5), 1)
    first = next(_numbers) * 100_000
    queries, documents = np.arange(first, first + side), np.arange(first + 50_000, first + 50_000 + side)
    right: NDArray[np.float32] = raw_scores(queries[:, None], documents[None, :], 0)
    begun = time.perf_counter()
    # Small chunks make a smooth curve: two servers answer eight chunks of the usual size in a second.
    chunk_pairs = None if watch is None else _WATCHED_CHUNK_PAIRS
    matrix = client.stream_grid(texts_of(queries), texts_of(documents), score_type="raw", chunk_pairs=chunk_pairs)
    assert isinstance(matrix, CountedMatrix)
    times, done = [0.0], [0.0]
    try:
        while watch is not None and not matrix.done():
            time.sleep(_TICK_SECONDS)
            times.append(time.perf_counter() - begun)
            done.append(float(matrix.usage.pairs))
        matrix.result()
    except RerankerError as error:
        ledger.error(error)
    seconds = time.perf_counter() - begun
    ledger.job(matrix, right)
    if watch is not None:
        watch(Curve(np.array(times), np.array(done)))
    return side * side / seconds


def draw(path: Path, shares: dict[int, list[float]], changes: Changes) -> None:
    """Plot the share of the ideal speed over the number of servers, and the speed over time while servers change."""
    canvas = Canvas(figsize=(9, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    counts = list(shares)
    spreads = [Spread.of(shares[count]) for count in counts]
    values = [spread.value for spread in spreads]
    errors = [[one.value - one.low for one in spreads], [one.high - one.value for one in spreads]]
    left.set_xscale("log", base=2)
    left.errorbar(counts, values, errors, fmt="o-", markersize=4, capsize=2, color="tab:green")
    left.axhline(_TARGET, color="black", linestyle="--", linewidth=0.8, label="target")
    left.set_xticks(counts, [str(count) for count in counts])
    left.set_ylim(0.8, 1.05)
    left.set_xlabel("servers")
    left.set_ylabel("pairs/s over servers x one server's pairs/s")
    left.legend(frameon=False, fontsize="small")
    curve = changes.curve
    begins = np.arange(0.0, max(curve.times[-1] - _WINDOW_SECONDS, 0.0), _TICK_SECONDS)
    right.plot(
        begins + _WINDOW_SECONDS / 2,
        [curve.rate(begin, begin + _WINDOW_SECONDS) for begin in begins],
        color="tab:green",
        label="pairs/s, mean of a second",
    )
    edges = [0.0, changes.killed, changes.added, float(curve.times[-1])]
    right.stairs(
        [3 * RATE, 2 * RATE, 3 * RATE], edges, color="black", linestyle="--", linewidth=0.8, label="servers' speed"
    )
    right.set_ylim(0, None)
    right.set_xlabel("seconds; one of three is killed, one is added")
    right.set_ylabel("pairs/s")
    right.legend(frameon=False, fontsize="small", loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_svg(canvas, path)
