"""Benchmark of the Ray Serve application with real replicas of fixed speed: share of the speed of all replicas, a
rolling update in mid-job, and messages that the ingress carries. Every score is checked.

python -m benchmarks.ray_serve; needs the extra ``ray``, and says so where it is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.fleet import pairs_per_second, run_grid
from chaos import model
from chaos.ledger import Ledger, counted_matrices
from chaos.servers import free_port
from loss_client import RerankerClient

RATE = 500.0
"""Pairs that one replica scores in a second."""
_SECONDS = (8.0, 24.0)
"""Length of the jobs. Opening a job's streams, one after the other, takes part of the first half second."""
_STREAMS = 3
"""Streams of the job for each replica."""
_INSTANT_RATE = 1e7
_INSTANT_PAIRS = 200_000
_SCALE_SECONDS = 150.0


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4], help="numbers of replicas to measure")
    parser.add_argument("--output", type=Path, default=Path("bench-results/ray.json"))
    options = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        print("skipped: ray is not installed; install the extra ray (reranker-grpc[ray])")
        return 0
    record: dict[str, Any] = {}
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="reranker-ray-") as name, counted_matrices():
        directory = Path(name)
        _run(directory, model.build(directory / "model"), options.replicas, ledger, record)
    record["ledger"] = ledger.record()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1), encoding="utf-8")
    wrong = ledger.wrong + ledger.missing + ledger.twice + len(ledger.errors)
    print(f"wrong, missing and repeated of {ledger.asked:,} scores, and errors: {wrong} {ledger.errors[:3]}")
    return int(wrong > 0)


def _run(directory: Path, served: Path, counts: list[int], ledger: Ledger, record: dict[str, Any]) -> None:
    import ray
    from ray import serve

    from benchmarks import ray_served

    # Replicas import this program's packages.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), str(Path("protos").resolve())])
    ray.init(num_cpus=2 * max(counts) + 2, num_gpus=0, include_dashboard=False, configure_logging=False)
    port = free_port()
    add = "reranker.v1.reranker_pb2_grpc.add_RerankerServiceServicer_to_server"
    serve.start(http_options={"port": free_port()}, grpc_options={"port": port, "grpc_servicer_functions": [add]})
    address = f"127.0.0.1:{port}"

    def deploy(count: int, rate: float, **more: Any) -> None:
        scaled = {"min_replicas": count, "max_replicas": count}
        serve.run(ray_served.app({**settings(served, directory, rate), **scaled, **more}), name="reranker")

    def running() -> int:
        states = serve.status().applications["reranker"].deployments["Reranker"].replica_states
        return int(states.get("RUNNING", 0))

    try:
        alone: dict[float, float] = {}
        for count, seconds in itertools.product(counts, _SECONDS):
            if seconds == _SECONDS[0]:
                deploy(count, RATE)
            # Serve sends a stream to the replica with fewer streams of two that it draws: streams of equal length would
            # end at different times. The streams of one job share its chunks by speed.
            rate = pairs_per_second([address] * (_STREAMS * count), 1, seconds * RATE * count, ledger)
            share = rate / (count * alone.setdefault(seconds, rate / count))
            record.setdefault(f"jobs of {seconds:.0f} s", {})[str(count)] = [share]
            print(
                f"{count} replicas, {seconds:.0f} s: {rate:,.0f} pairs/s, {share:.3f} of {count} x one replica's",
                flush=True,
            )
        _check_error(address, ledger)
        record["rolling update"] = _update(deploy, counts[-1], address, ledger)
        print("rolling update: {:.1f} s, longest pause of a job {:.1f} s".format(*record["rolling update"]), flush=True)
        serve.delete("reranker")  # scaled down, the replicas from before would stay for minutes
        deploy(1, RATE, max_replicas=2, target_pairs=int(RATE))
        record["second replica"] = _scale_up(running, address, ledger)
        print(f"autoscaling: a second replica after {record['second replica']:.0f} s of work", flush=True)
        deploy(1, _INSTANT_RATE)
        for chunk_pairs in (128, 4096):
            rate = pairs_per_second(address, 1, _INSTANT_PAIRS / (1 if chunk_pairs > 1000 else 8), ledger, chunk_pairs)
            record[f"instant, chunks of {chunk_pairs}"] = rate
            print(f"chunks of {chunk_pairs}: {rate:,.0f} pairs/s, {rate / chunk_pairs:,.0f} chunks/s", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def settings(served: Path, directory: Path, rate: float) -> dict[str, Any]:
    """Return the settings of a replica of fixed speed.

    Args:
        served: Directory of the model.
        directory: Gets the counts of the scored pairs.
        rate: Pairs a second.
    """
    own = {"seed": 0, "rate": rate, "scored": str(directory / "scored")}
    return {"model": str(served), "engine": "torch", "engine_args": own, "cache_bytes": 0, "graceful_timeout": 5.0}


def _check_error(address: str, ledger: Ledger) -> None:
    """Check that a wrong request gets the code and the message of the stand-alone server."""
    import grpc

    from reranker.v1 import reranker_pb2, reranker_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            reranker_pb2_grpc.RerankerServiceStub(channel).Rerank(reranker_pb2.RerankRequest(query="q"), timeout=60)
            ledger.error("a request without documents was answered")
        except grpc.RpcError as error:
            print(f"a request without documents: {error.code().name}: {error.details()}", flush=True)
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT or "documents" not in error.details():
                ledger.error(f"a request without documents: {error.code()}: {error.details()}")


def _update(deploy: Any, count: int, address: str, ledger: Ledger) -> tuple[float, float]:
    """Replace all replicas while jobs run; returns its seconds and the longest pause of a job."""
    with _working(count, address, ledger):
        begun = time.perf_counter()
        deploy(count, RATE, bulk_share=0.2)  # any changed argument
        seconds = time.perf_counter() - begun
    return seconds, ledger.longest_pause


def _scale_up(running: Callable[[], int], address: str, ledger: Ledger) -> float:
    """Work until the autoscaler has started a second replica; returns the seconds."""
    _wait("one replica alone", lambda: running() == 1, ledger)
    begun = time.perf_counter()
    with _working(2, address, ledger):
        _wait("a second replica", lambda: running() == 2, ledger)
    return time.perf_counter() - begun


def _wait(awaited: str, reached: Callable[[], bool], ledger: Ledger) -> None:
    deadline = time.perf_counter() + _SCALE_SECONDS
    while not reached():
        if time.perf_counter() > deadline:
            ledger.error(f"not seen within {_SCALE_SECONDS:.0f} s: {awaited}")
            break
        time.sleep(0.5)


@contextmanager
def _working(count: int, address: str, ledger: Ledger) -> Iterator[None]:
    """Run one job after the other in ``count`` clients."""
    ending = threading.Event()

    def ask() -> None:
        with RerankerClient(address, timeout=120) as client:
            while not ending.is_set():
                run_grid(client, ledger, RATE)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
