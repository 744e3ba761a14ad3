"""The server process from start-up to shutdown: health, reflection, signals, a dead engine, wrong settings."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from . import forked
from .holding import DIE, LONG_TOKENS, RELEASE
from .scrapes import scrape
from .servers import ServerProcess

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def check(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def flags(model: Path) -> list[str]:
    return ["--model", str(model), "--engine", "torch", "--threads", "1"]


def test_a_ready_server_is_serving_under_both_names(cross_encoder_server: ServerProcess) -> None:
    assert check(cross_encoder_server.address) == SERVING
    assert check(cross_encoder_server.address, "reranker.v1.RerankerService") == SERVING


def test_the_ready_line_names_address_and_model(cross_encoder_server: ServerProcess, cross_encoder: Path) -> None:
    line = cross_encoder_server.line("event=ready")
    assert f"address={cross_encoder_server.address}" in line
    assert f"model={cross_encoder.name}" in line
    assert len([one for one in cross_encoder_server.lines if "event=ready" in one]) == 1


@contextmanager
def holding(model: Path, *flags: str) -> Iterator[tuple[ServerProcess, grpc.Future]]:
    """A server, and a call inside the engine that is answered only after ``RELEASE``."""
    flags = ("--model", str(model), "--metrics-port", "0", *flags)
    with ServerProcess(*flags, module="tests.holding") as server, grpc.insecure_channel(server.address) as channel:
        request = pb.RerankRequest(query="a query", documents=["word " * LONG_TOKENS])
        call = rpc.RerankerServiceStub(channel).Rerank.future(request, timeout=240)
        while not scrape(server)["reranker_engine_sequences"]:
            assert not call.done()
        yield server, call


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_calls_in_flight_finish(cross_encoder: Path, number: signal.Signals) -> None:
    with holding(cross_encoder, "--graceful-timeout", "240") as (server, call):
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(health).status == SERVING
            server.signal(number)
            assert next(health).status == NOT_SERVING
            assert not call.done()
            server.signal(RELEASE)
            assert len(call.result().results) == 1
            health.cancel()
        assert server.wait() == 0
    assert any("event=stopped" in line for line in server.lines)


def test_a_call_longer_than_the_grace_period_is_ended(cross_encoder: Path) -> None:
    with holding(cross_encoder, "--graceful-timeout", "0.2") as (server, call):
        server.signal(signal.SIGTERM)
        assert call.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.wait() == 0


def test_the_death_of_the_engine_ends_calls_and_server(cross_encoder: Path) -> None:
    with holding(cross_encoder) as (server, call):
        server.signal(DIE)
        assert call.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.wait() == 1
        assert "it was told to" in server.line("engine died")


def test_an_engine_that_finishes_nothing_turns_health_until_it_does(cross_encoder: Path) -> None:
    with holding(cross_encoder, "--stall-seconds", "0.5") as (server, call):
        with grpc.insecure_channel(server.address) as channel:
            for service in ("", "reranker.v1.RerankerService"):
                request = health_pb2.HealthCheckRequest(service=service)
                health = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=60)
                while next(health).status != NOT_SERVING:
                    pass
                health.cancel()
            assert "level=error" in server.line("engine stalled")
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            server.signal(RELEASE)
            while next(health).status != SERVING:
                pass
            assert len(call.result().results) == 1
            health.cancel()


def test_a_signal_while_the_model_loads_ends_the_server(bi_encoder: Path) -> None:
    with ServerProcess(*flags(bi_encoder), ready=False, fresh=True) as server:  # it imports transformers for seconds
        address = server.line("event=listening").split("address=")[1].split()[0]
        assert check(address) == NOT_SERVING
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            rpc.RerankerServiceStub(channel).Rerank(pb.RerankRequest(query="a", documents=["b"]), timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "still loading" in caught.value.details()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_taken_port_is_an_error_at_once(cross_encoder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with ServerProcess(*flags(cross_encoder), "--port", str(taken.getsockname()[1]), ready=False) as server:
            server.line("cannot listen")
            assert server.wait() == 1


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    with ServerProcess(*flags(tmp_path), ready=False) as server:
        assert "config.json" in server.line("cannot serve the model")
        assert server.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "70000"], {}, "port"),
        (["--engine", "magic"], {}, "'auto', 'torch' or 'vllm'"),
        ([], {"RERANKER_GRACEFUL_TIMEOUT": "soon"}, "graceful_timeout"),
        (["--limits.max-text-bytes", "0"], {}, "limits.max_text_bytes"),
        (["--no-such-flag", "1"], {}, "no-such-flag"),
        ([], {"RERANKER_CACHE_BYTE": "1"}, "the nearest is RERANKER_CACHE_BYTES"),
        ([], {"RERANKER_PORT": "tcp://10.0.0.1:50051"}, "enableServiceLinks: false"),
        (["--limits.max-message-bytes", "65536"], {}, "--limits.max-pairs-per-chunk is 16384"),
    ],
)
def test_wrong_settings_exit_with_2_and_a_reason(arguments: list[str], environment: dict[str, str], words: str) -> None:
    command = [sys.executable, "-m", "reranker_service", *arguments]
    result = forked.run(command, env={**os.environ, **environment}, timeout=240)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_every_flag() -> None:
    command = [sys.executable, "-m", "reranker_service", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    for flag in (
        "--model",
        "--engine",
        "--host",
        "--port",
        "--default-length",
        "--max-length",
        "--limits.max-text-bytes",
        "--graceful-timeout",
    ):
        assert flag in result.stdout


def test_every_flag_is_also_a_variable(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANKER_MODEL", str(cross_encoder))
    monkeypatch.setenv("RERANKER_ENGINE", "torch")
    monkeypatch.setenv("RERANKER_DEFAULT_LENGTH", "17")
    monkeypatch.setenv("RERANKER_MAX_LENGTH", "33")
    monkeypatch.setenv("RERANKER_LIMITS__MAX_PAIRS_PER_CHUNK", "33")
    with ServerProcess() as server, grpc.insecure_channel(server.address) as channel:
        info = rpc.RerankerServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.engine) == (cross_encoder.name, "torch")
    assert (info.default_length, info.max_length) == (17, 33)
    assert info.limits.max_pairs_per_chunk == 33


def test_what_the_engine_chose_is_logged(cross_encoder_server: ServerProcess) -> None:
    assert "threads=1" in cross_encoder_server.line("event=engine")
