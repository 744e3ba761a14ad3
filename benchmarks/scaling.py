"""Benchmark of many servers: 1 to 32 directly and behind Envoy, and hosts of which one is partitioned away and healed.

Real server processes have an engine of fixed speed. The figure is pairs a second over (servers x one server's speed).
Every score is checked. ``benchmarks.ray_serve`` measures the same behind Ray Serve, and its figures are plotted beside.

python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure as Canvas

from benchmarks.fleet import pairs_per_second
from benchmarks.namespaces import HostServer, hosts, unusable
from benchmarks.report import save_svg
from benchmarks.servers import Curve, score
from chaos import model
from chaos.envoy import PROGRAM
from chaos.ledger import Ledger, counted_matrices
from chaos.servers import START_SECONDS, Server, free_port
from examples.processes import Child
from loss_client import RerankerClient

RATE = 250.0
"""Pairs that one server scores in a second: 32 servers then take a part of two cores, with their client."""
COUNTS = (1, 2, 4, 8, 16, 32)
PARTS = ("direct", "envoy", "partition")
TARGET = 0.95
_SECONDS = 12.0
_STREAMS = 1
"""Streams of a job behind Envoy for each server: a server without a stream would be idle."""
_HOSTS = 3
_PARTITION_SECONDS = 24.0
_STALL_SECONDS = 2.0
_WINDOW_SECONDS = 2.0
_COLOURS = {"direct": "tab:green", "envoy": "tab:blue", "ray": "tab:orange"}


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of servers")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="length of a job")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each figure, of which the median is shown")
    parser.add_argument("--envoy", type=Path, default=PROGRAM, help="Envoy's program; make chaos installs it")
    parser.add_argument(
        "--envoy-config", type=Path, default=Path("deploy/envoy/envoy.yaml"), help="the configuration that is shipped"
    )
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "scaling.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as name, counted_matrices():
        directory = Path(name)
        served = model.build(directory / "model")
        if {"direct", "envoy"} & set(options.only):
            _measure_counts(options, served, directory, ledger, record)
        if "partition" in options.only:
            if reason := unusable():
                print(f"partition: skipped: {reason}")
            else:
                record["partition"] = _partition(served, directory, ledger)
    wrong = ledger.wrong + ledger.missing + ledger.twice + len(ledger.errors)
    record.setdefault("checked", []).append({"asked": ledger.asked, "wrong": wrong})
    path.write_text(json.dumps(record), encoding="utf-8")
    if "partition" in record:
        draw(options.output / "scaling.svg", record, options.output / "ray.json")
    print(f"wrong, missing and repeated of {ledger.asked:,} scores, and errors: {wrong} {ledger.errors[:3]}")
    return int(wrong > 0)


def _measure_counts(
    options: argparse.Namespace, served: Path, directory: Path, ledger: Ledger, record: dict[str, Any]
) -> None:
    shares: dict[str, dict[int, list[float]]] = {part: {} for part in ("direct", "envoy") if part in options.only}
    if "envoy" in shares and not (options.envoy.exists() and options.envoy_config.exists()):
        print(f"envoy: skipped: there is no {options.envoy} or no {options.envoy_config}")
        del shares["envoy"]
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(served, directory, RATE)) for _ in range(max(options.counts))]
        for server in servers:
            server.wait_ready()
        for _ in range(options.rounds):
            alone: dict[str, float] = {}
            for count in options.counts:
                addresses = [server.address for server in servers[:count]]
                for part, found in shares.items():
                    with _in_front(part, directory, addresses, options) as reached:
                        rate = pairs_per_second(reached, 1, options.seconds * RATE * count, ledger)
                    share = rate / (count * alone.setdefault(part, rate / count))
                    found.setdefault(count, []).append(share)
                    print(f"{part}: {count} servers, {rate:,.0f} pairs/s, {share:.3f}", flush=True)
    for part, found in shares.items():
        record[part] = {str(count): values for count, values in found.items()}


@contextmanager
def _in_front(
    part: str, directory: Path, addresses: Sequence[str], options: argparse.Namespace
) -> Iterator[Sequence[str]]:
    """Give the addresses that a client uses: the servers' own, or Envoy's as often as there are servers."""
    if part == "direct":
        yield addresses
        return
    port, admin = free_port(), free_port()
    path = directory / "envoy.yaml"
    configuration = without_tls(yaml.safe_load(options.envoy_config.read_text()), port, addresses)
    configuration["admin"] = {"address": _socket_address("127.0.0.1", admin)}
    path.write_text(yaml.safe_dump(configuration))
    command = [str(options.envoy), "--config-path", str(path), "--disable-hot-restart", "--concurrency", "1"]
    envoy = Child(command, name="Envoy")
    try:
        envoy.wait_for("starting main dispatch loop", START_SECONDS)
        while _healthy(admin) < len(addresses):
            time.sleep(0.1)
        yield [f"127.0.0.1:{port}"] * (_STREAMS * len(addresses))
    finally:
        envoy.stop()


def _healthy(admin: int) -> int:
    """Return the number of servers whose health Envoy has checked."""
    url = f"http://127.0.0.1:{admin}/stats?filter=membership_healthy&format=json"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return sum(one["value"] for one in json.load(answer)["stats"] if "name" in one)


def without_tls(configuration: dict[str, Any], port: int, addresses: Sequence[str]) -> dict[str, Any]:
    """Change Envoy's configuration to listen at a loopback port, in plaintext, in front of these servers."""
    resources = configuration["static_resources"]
    (listener,), (cluster,) = resources["listeners"], resources["clusters"]
    listener["address"] = _socket_address("127.0.0.1", port)
    for chain in listener["filter_chains"]:
        chain.pop("transport_socket", None)
    ends = [address.rpartition(":") for address in addresses]
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": _socket_address(host, int(end))}} for host, _, end in ends]}
    ]
    return configuration


def _socket_address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _partition(served: Path, directory: Path, ledger: Ledger) -> dict[str, Any]:
    """Cut one of three hosts off after a quarter of a job, and heal the network after half of it."""
    times: list[float] = []
    curves: list[Curve] = []
    with ExitStack() as stack:
        made = stack.enter_context(hosts(_HOSTS))
        servers = [stack.enter_context(HostServer(host, served, directory, RATE)) for host in made]
        for server in servers:
            server.wait_ready()
        client = stack.enter_context(
            RerankerClient([server.address for server in servers], timeout=60, stall_timeout=_STALL_SECONDS)
        )
        score(client, ledger, 0.2 * RATE * _HOSTS)

        def change() -> None:
            for act in (made[0].partition, made[0].heal):
                time.sleep(_PARTITION_SECONDS / 4)
                times.append(time.monotonic())
                act()

        changing = threading.Thread(target=change)
        begun = time.monotonic()
        changing.start()
        watch: Callable[[Curve], object] = curves.append
        score(client, ledger, _PARTITION_SECONDS * (_HOSTS - 0.3) * RATE, watch)
        changing.join()
    curve = curves[0]
    cut, healed = (moment - begun for moment in times)
    end = float(curve.times[-1])
    record = {
        "cut": cut,
        "healed": healed,
        "before": curve.rate(1.0, cut) / (_HOSTS * RATE),
        "during": curve.rate(cut, healed) / ((_HOSTS - 1) * RATE),
        "last second": curve.rate(end - 3, end - 1) / (_HOSTS * RATE),
        "times": curve.times.tolist(),
        "pairs": curve.pairs.tolist(),
    }
    print(
        "partition: {before:.2f} of three servers before, {during:.2f} of two without one, {last:.2f} of three at the "
        "end".format(before=record["before"], during=record["during"], last=record["last second"]),
        flush=True,
    )
    return record


def draw(path: Path, record: dict[str, Any], ray: Path) -> None:
    """Plot the shares over the number of servers, and the speed over time around the partition."""
    canvas = Canvas(figsize=(9, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    left.set_xscale("log", base=2)
    curves = {part: record[part] for part in ("direct", "envoy") if part in record}
    if ray.exists():
        # Jobs as long as those of the other parts.
        curves["ray"] = json.loads(ray.read_text())["jobs of 8 s"]
    for part, shares in curves.items():
        counts = [int(count) for count in shares]
        values = [float(np.median(shares[str(count)])) for count in counts]
        left.plot(counts, values, "o-", markersize=4, color=_COLOURS[part], label=part)
    left.axhline(TARGET, color="black", linestyle="--", linewidth=0.8, label="target")
    left.set_xticks(COUNTS, [str(count) for count in COUNTS])
    left.set_ylim(0.5, 1.1)
    left.set_xlabel("servers")
    left.set_ylabel("pairs/s over servers x one server's pairs/s")
    left.legend(frameon=False, fontsize="small")
    found = record["partition"]
    curve = Curve(np.array(found["times"]), np.array(found["pairs"]))
    begins = np.arange(0.0, max(curve.times[-1] - _WINDOW_SECONDS, 0.0), 0.1)
    speeds = [curve.rate(begin, begin + _WINDOW_SECONDS) / RATE for begin in begins]
    right.plot(begins + _WINDOW_SECONDS / 2, speeds, color="tab:green", label=f"mean of {_WINDOW_SECONDS:g} s")
    edges = [0.0, found["cut"], found["healed"], float(curve.times[-1])]
    right.stairs(
        [_HOSTS, _HOSTS - 1, _HOSTS], edges, color="black", linestyle="--", linewidth=0.8, label="reachable servers"
    )
    right.set_ylim(0, None)
    right.set_xlabel("seconds; one of three hosts is cut off, and comes back")
    right.set_ylabel("pairs/s over one server's pairs/s")
    right.legend(frameon=False, fontsize="small", loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_svg(canvas, path)


if __name__ == "__main__":
    sys.exit(main())
