"""Envoy with the configuration of ``deploy/envoy``, in front of real servers; skipped where Envoy is not installed."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import yaml

from chaos import model
from chaos.envoy import PROGRAM
from chaos.scores import raw_scores_of_texts, texts_of
from chaos.servers import Server, free_port
from examples.processes import Child
from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from .certificates import Authority, channel

ROOT = Path(__file__).parent.parent
CONFIGURATION = ROOT / "deploy" / "envoy" / "envoy.yaml"
WAIT_SECONDS = 60.0
SERVERS = 3

pytestmark = pytest.mark.skipif(
    not (ROOT / PROGRAM).exists(), reason=f"there is no {PROGRAM}; `make envoy` installs it"
)


class Running(NamedTuple):
    """Envoy and the servers behind it."""

    servers: list[Server]
    authority: Authority
    port: int
    admin: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def channel(self) -> grpc.Channel:
        return channel(self.address, self.authority.ca)

    def client(self) -> RerankerClient:
        return RerankerClient(f"grpcs://{self.address}", root_certificates=self.authority.ca, timeout=WAIT_SECONDS)

    def hosts(self) -> dict[str, dict[str, Any]]:
        """What Envoy says about each server, by its address."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/clusters?format=json", timeout=30) as answer:
            (cluster,) = json.load(answer)["cluster_statuses"]
        addresses = (one["address"]["socket_address"] for one in cluster["host_statuses"])
        names = [f"{one['address']}:{one['port_value']}" for one in addresses]
        return dict(zip(names, cluster["host_statuses"], strict=True))

    def healthy(self) -> set[str]:
        return {
            name for name, host in self.hosts().items() if host["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def active(self, server: Server) -> int:
        """Calls that Envoy has open at a server."""
        stats = {one["name"]: int(one.get("value", 0)) for one in self.hosts()[server.address]["stats"]}
        return stats["rq_active"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def adapted(authority: Authority, servers: list[Server], port: int, admin: int) -> dict[str, Any]:
    """The configuration with this test's ports, certificate and servers, and with shorter times."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["admin"]["address"]["socket_address"]["port_value"] = admin
    (listener,) = configuration["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    certificate, key = authority.issue("envoy")
    (secured,) = listener["filter_chains"]
    (pair,) = secured["transport_socket"]["typed_config"]["common_tls_context"]["tls_certificates"]
    pair["certificate_chain"]["filename"], pair["private_key"]["filename"] = str(certificate), str(key)
    (cluster,) = configuration["static_resources"]["clusters"]
    addresses = [one.address.rpartition(":") for one in servers]
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(number)}}}}
        for host, _, number in addresses
    ]
    cluster["health_checks"][0].update(interval="0.5s", no_traffic_interval="0.5s")
    cluster["outlier_detection"].update(interval="0.2s", base_ejection_time="0.5s")
    return configuration


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("envoy")
    authority = Authority(folder / "tls")
    directory = model.build(folder / "model")
    servers = [Server(directory, folder, rate=20_000) for _ in range(SERVERS)]
    port, admin = free_port(), free_port()
    path = folder / "envoy.json"
    path.write_text(json.dumps(adapted(authority, servers, port, admin)))
    for server in servers:
        server.start()
    command = [str(ROOT / PROGRAM), "--config-path", str(path), "--disable-hot-restart", "--concurrency", "2"]
    envoy = Child(command, name="Envoy")
    try:
        for server in servers:
            server.wait_ready()
        envoy.wait_for("starting main dispatch loop", WAIT_SECONDS)
        running = Running(servers, authority, port, admin)
        wait_until(lambda: len(running.healthy()) == SERVERS)
        yield running
    finally:
        envoy.stop()
        for server in servers:
            server.__exit__(None, None, None)


@contextlib.contextmanager
def open_streams(running: Running, count: int) -> Iterator[None]:
    """Streams of one connection that stay open for as long as the block lasts, and then end in order."""
    sent: list[queue.SimpleQueue[pb.RerankStreamRequest | None]] = [queue.SimpleQueue() for _ in range(count)]
    replies: list[Iterator[pb.RerankStreamResponse]] = []
    with running.channel() as one:
        try:
            for messages in sent:
                messages.put(pb.RerankStreamRequest(open=pb.StreamOpen()))
                replies.append(
                    rpc.RerankerServiceStub(one).RerankStream(iter(messages.get, None), timeout=WAIT_SECONDS)
                )
                assert next(replies[-1]).HasField("opened")
            yield
        finally:
            for messages in sent:
                messages.put(None)
        assert [list(one) for one in replies] == [[]] * count


def scores_are_right(running: Running, first: int, size: int, during: Callable[[], object] = lambda: None) -> None:
    """Score a grid of texts that no other job has, and compare all scores with the closed form."""
    queries = texts_of(np.arange(first, first + size))
    documents = texts_of(np.arange(first + size, first + 2 * size))
    with running.client() as client:
        matrix = client.stream_grid(queries, documents, score_type="raw")
        during()
        found = matrix.result(WAIT_SECONDS)
    np.testing.assert_allclose(found, raw_scores_of_texts(queries, documents, 0), atol=1e-5)


def test_scores_come_through_tls_and_plaintext_is_refused(running: Running) -> None:
    scores_are_right(running, 0, 32)
    with grpc.insecure_channel(running.address) as plain, pytest.raises(grpc.RpcError) as refused:
        rpc.RerankerServiceStub(plain).GetModelInfo(pb.GetModelInfoRequest(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_streams_spread_evenly_over_the_servers(running: Running) -> None:
    with open_streams(running, 4 * SERVERS):
        assert [running.active(server) for server in running.servers] == [4] * SERVERS


def test_large_messages_and_request_ids_pass(running: Running) -> None:
    with running.channel() as one:
        stub = rpc.RerankerServiceStub(one)
        request = pb.RerankRequest(query="1 2 3", documents=["word " * 200_000] * 7)
        assert request.ByteSize() > 6_900_000
        _, call = stub.Rerank.with_call(request, metadata=[("x-request-id", "an-id:7")], timeout=WAIT_SECONDS)
    assert dict(call.trailing_metadata())["x-request-id"] == "an-id:7"


def test_a_dead_server_is_ejected_and_jobs_go_on(running: Running) -> None:
    def kill() -> None:
        wait_until(lambda: any(running.active(server) for server in running.servers))
        busiest = max(running.servers, key=running.active)
        busiest.end(signal.SIGKILL)
        dead.append(busiest)

    dead: list[Server] = []
    scores_are_right(running, 10_000, 224, kill)
    (server,) = dead
    alive = {one.address for one in running.servers} - {server.address}
    wait_until(lambda: running.healthy() == alive)
    with open_streams(running, 2 * SERVERS):
        assert running.active(server) == 0
    server.start()
    server.wait_ready()
    wait_until(lambda: len(running.healthy()) == SERVERS)
    with open_streams(running, SERVERS):
        assert running.active(server) == 1


def test_a_server_that_stops_in_order_finishes_its_streams(running: Running) -> None:
    with open_streams(running, SERVERS):
        server = running.servers[0]
        server.process.signal(signal.SIGTERM)
        wait_until(lambda: server.address not in running.healthy())
        assert running.active(server) == 1, "Envoy leaves the stream to the server"
    assert server.wait_end() == 0
    server.start()
    server.wait_ready()
    wait_until(lambda: len(running.healthy()) == SERVERS)
