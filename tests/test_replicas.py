"""``--replicas``: devices and ports are shared out, a dead server is started again, and all end together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from pydantic_settings import CliApp
from structlog.testing import capture_logs

from chaos.servers import free_port
from examples.processes import ProcessError
from loss_client import RerankerClient
from loss_client.client.addresses import parse_addresses
from reranker_service import devices
from reranker_service.replicas import Plan, Supervisor, flags_of, plans
from reranker_service.settings import Settings

from .forked import ForkedProgram, ensure_fork_server
from .servers import ServerProcess


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs."""
    monkeypatch.setattr(devices, "_gpus_of_machine", lambda: 4)


@pytest.mark.parametrize(
    "given",
    [
        {"model": "m", "port": 0, "engine_args": {"a": [1, "b c"]}, "compile": False, "graceful_timeout": 0.5},
        {"limits": {"max_text_bytes": 77}, "prompts": {"query": "-q: "}, "reflection": True, "replicas": "auto"},
        {"host": "::1", "token_file": "a b", "bulk_share": 0.0, "metrics_port": None},
    ],
)
def test_flags_of_settings_give_equal_settings(given: dict[str, object]) -> None:
    settings = Settings(**given)
    assert CliApp.run(Settings, list(flags_of(settings))) == settings


def test_each_server_gets_ports_and_cores_of_its_own() -> None:
    settings = Settings(replicas=2, port=7000, metrics_port=9000, device="cpu")
    first, second = plans(settings, {}, [0, 1, 4, 5, 6])
    assert {"--port=7000", "--metrics-port=9000", "--replicas=1"} <= set(first.flags)
    assert {"--port=7001", "--metrics-port=9001", "--replicas=1"} <= set(second.flags)
    assert (first.cores, second.cores) == ({0, 1}, {4, 5, 6})
    assert second.environment["VLLM_CPU_OMP_THREADS_BIND"] == "4,5,6"
    assert [sorted(one.cores) for one in plans(Settings(replicas=3, device="cpu"), {}, [8, 9])] == [[8], [9], [8]]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("replicas", "engine_args", "visible", "shares"),
    [
        ("auto", {}, None, ["0", "1", "2", "3"]),
        (2, {}, None, ["0", "1"]),
        ("auto", {}, "3,GPU-ab,-1,2", ["3", "GPU-ab"]),
        ("auto", {"tensor_parallel_size": 2}, None, ["0,1", "2,3"]),
        (1, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, None, ["0,1,2,3"]),
    ],
)
def test_each_server_gets_gpus_of_its_own(
    replicas: object, engine_args: dict[str, object], visible: str | None, shares: list[str]
) -> None:
    environment = {} if visible is None else {devices.VISIBLE: visible}
    planned = plans(Settings(replicas=replicas, engine_args=engine_args), environment, [0])
    assert [one.environment[devices.VISIBLE] for one in planned] == shares
    assert not any(one.cores for one in planned)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replicas": 5}, "5 x 1 GPUs are needed, and 4 are visible"),
        ({"replicas": 3, "engine_args": {"tensor_parallel_size": 2}}, "3 x 2 GPUs are needed"),
        ({"replicas": 2, "engine_args": {"tensor_parallel_size": "2"}}, "give an integer"),
        ({"replicas": 2, "device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"replicas": 4, "port": 65533}, "leaves no room for 4 ports"),
    ],
)
def test_what_cannot_be_shared_out_is_an_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plans(Settings(**settings), {}, [0])


def test_a_machine_without_gpus_has_one_server_with_auto() -> None:
    assert len(plans(Settings(replicas="auto"), {devices.VISIBLE: ""}, [0, 1])) == 1


def launch(command: Sequence[str], environment: Mapping[str, str]) -> ForkedProgram:
    """A server that is forked: its parent is the fork server, so that it cannot watch the supervisor."""
    python, dash, _, _, *rest = command
    return ForkedProgram([python, dash, *rest], env=environment)


@contextlib.asynccontextmanager
async def supervised(planned: Sequence[Plan], module: str) -> AsyncIterator[tuple[Supervisor, asyncio.Task[int]]]:
    supervisor = Supervisor(planned, 5.0, module, launch, first_backoff=0.05)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running
    finally:
        supervisor.stop()
        await running


async def event(logs: list[dict[str, object]], name: str) -> dict[str, object]:
    """The first log event of a name, once there is one."""
    async with asyncio.timeout(60):
        while True:
            for one in logs:
                if one["event"] == name:
                    return one
            await asyncio.sleep(0.02)


def test_a_dead_server_is_started_again_while_the_others_go_on(cross_encoder: Path) -> None:
    ensure_fork_server()
    settings = Settings(model=str(cross_encoder), port=free_port(), replicas=2, engine="torch", graceful_timeout=5)

    async def run() -> None:
        planned = plans(settings, {}, [0, 1])
        with capture_logs() as logs:
            async with supervised(planned, "tests.holding") as (supervisor, running):
                addresses = str((await event(logs, "ready"))["addresses"])
                assert addresses == f"127.0.0.1:{settings.port},127.0.0.1:{settings.port + 1}"
                with RerankerClient(addresses) as client:
                    assert len(await asyncio.to_thread(client.rerank, "q", ["a", "b"])) == 2
                pid = next(one["pid"] for one in logs if one["event"] == "server started" and one["replica"] == 1)
                os.kill(int(str(pid)), signal.SIGKILL)
                assert (await event(logs, "server ended"))["status"] == -signal.SIGKILL
                with RerankerClient(addresses.split(",")[0]) as client:
                    assert len(await asyncio.to_thread(client.rerank, "q", ["c"])) == 1
                assert (await event(logs, "server ready again"))["address"] == addresses.split(",")[1]
                with RerankerClient(addresses.split(",")[1]) as client:
                    assert len(await asyncio.to_thread(client.rerank, "q", ["d"])) == 1
                supervisor.stop()
                assert await running == 0
        assert [one["replica"] for one in logs if one["event"] == "server started"] == [0, 1, 1]

    asyncio.run(run())


def test_a_server_that_cannot_start_ends_all(cross_encoder: Path, tmp_path: Path) -> None:
    ensure_fork_server()

    async def run() -> None:
        good, bad = (Settings(model=str(model), port=0, engine="torch") for model in (cross_encoder, tmp_path))
        planned = [Plan(number, tuple(flags_of(one)), {}) for number, one in enumerate((good, bad))]
        with capture_logs() as logs:
            async with supervised(planned, "tests.holding") as (_, running):
                async with asyncio.timeout(60):
                    assert await running == 1
        assert any(str(one["event"]).startswith("cannot start") and one["replica"] == 1 for one in logs)

    asyncio.run(run())


def light(port: int) -> ServerProcess:
    flags = ("--replicas", "2", "--port", str(port), "--device", "cpu")
    return ServerProcess(*flags, ready=False, fresh=True, module="tests.light_server")


def test_the_program_logs_the_addresses_passes_sigterm_on_and_pins_cores() -> None:
    port = free_port()
    with light(port) as server:
        found = server.wait_for(r"event=ready addresses=(\S+)")[1]
        assert [str(one) for one in parse_addresses(found)] == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        cores = sorted(os.sched_getaffinity(0))
        halves = cores[: len(cores) // 2] or cores[:1], cores[len(cores) // 2 :]
        for number, half in enumerate(halves):
            assert server.wait_for(rf"event=light .*port={port + number} cores=(\S+)")[1] == ",".join(map(str, half))
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_servers_end_with_a_supervisor_that_is_killed() -> None:
    with light(free_port()) as server:
        server.wait_for(r"event=ready addresses")
        pids = [int(re.search(r"pid=(\d+)", line)[1]) for line in server.lines if "event=light" in line]
        server.signal(signal.SIGKILL)
        server.wait(30)
        deadline = time.monotonic() + 10
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(pids) == 2


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cuda:1", None, "1"),
        ("cuda:1", "2,3", "3"),
        ("cuda:0", "GPU-ab,GPU-cd", "GPU-ab"),
        ("cuda", "2,3", "2,3"),
        ("auto", None, None),
    ],
)
def test_vllm_sees_only_the_gpu_of_the_device_flag(
    device: str, before: str | None, after: str | None, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reranker_service import loading
    from reranker_service.engines import vllm_processes

    monkeypatch.delenv(devices.VISIBLE, raising=False)
    if before is not None:
        monkeypatch.setenv(devices.VISIBLE, before)
    seen: list[str | None] = []
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    # vLLM's processes inherit the variables of this moment.
    monkeypatch.setattr(vllm_processes, "start_importing", lambda: seen.append(os.environ.get(devices.VISIBLE)))
    try:
        loading.load(Settings(model=str(cross_encoder), engine="vllm", device=device))
    finally:
        os.environ.pop(devices.VISIBLE, None)
    assert seen == [after]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "engine_args", "words"),
    [
        ("cuda:4", {}, "4 GPUs are visible"),
        ("cpu", {}, "is for the torch engine"),
        ("cuda:1", {"tensor_parallel_size": 2}, "is one GPU"),
        ("auto", {"tensor_parallel_size": 8}, "is 8, and 4 GPUs are visible"),
    ],
)
def test_a_device_that_vllm_cannot_have_is_an_error(device: str, engine_args: dict[str, object], words: str) -> None:
    environment: dict[str, str] = {}
    with pytest.raises(devices.DeviceError, match=words):
        devices.pin(device, engine_args, environment)
    assert environment == {}


def test_several_addresses_may_be_one_string() -> None:
    assert parse_addresses("a:1,grpcs://b:2") == parse_addresses(["a:1", "grpcs://b:2"])
    assert len(parse_addresses("ipv4:1.2.3.4:5,6.7.8.9:5")) == 1
    with pytest.raises(ValueError, match="not understood"):
        parse_addresses("a:1,")


def test_ready_is_said_to_the_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reranker_service.observing.notify import notify_ready

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "s"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "s"))
        notify_ready("127.0.0.1:1")
        assert manager.recv(4096).decode().splitlines()[:2] == ["READY=1", "X_ADDRESS=127.0.0.1:1"]
    notify_ready("127.0.0.1:1")  # a manager that is gone does no harm


def test_a_wrong_number_of_replicas_is_an_error_of_settings() -> None:
    with ServerProcess("--replicas", "0", ready=False) as server:
        with pytest.raises(ProcessError):
            server.wait_for("event=ready", 30)
        assert server.wait(30) == 2
        assert any("replicas" in line for line in server.lines)
