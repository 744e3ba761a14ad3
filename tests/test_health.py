"""Health of a running server: the port for probes without TLS, and the command that asks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.commands import health

from .certificates import Authority, channel
from .holding import RELEASE
from .servers import ServerProcess

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(
    authority: Authority, cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with mutual TLS and tokens, and a port for probes."""
    cert, key = authority.issue("server")
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"trainer {TOKEN}\n")
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.ca)]
    flags += ["--model", str(cross_encoder), "--token-file", str(tokens), "--health-port", "0"]
    with ServerProcess(*flags, module="tests.holding") as process:
        yield process


def probed(server: ServerProcess) -> str:
    return re.search(r"health=(\S+)", server.line("answering health checks"))[1]


def test_probes_need_neither_tls_nor_a_token(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main([probed(server)]) == 0
    assert capsys.readouterr().out == f"{probed(server)}: SERVING\n"


def test_the_port_of_probes_answers_no_other_call(server: ServerProcess) -> None:
    with grpc.insecure_channel(probed(server)) as plain:
        with pytest.raises(grpc.RpcError) as refused:
            rpc.RerankerServiceStub(plain).GetModelInfo(pb.GetModelInfoRequest(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_command_says_why_there_is_no_answer(
    server: ServerProcess, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    assert health.main([server.address, "--tls-ca", str(authority.ca)]) == 1  # it has no client certificate
    assert "UNAVAILABLE" in capsys.readouterr().err
    assert health.main(["127.0.0.1:1", "--timeout", "5"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        health.main([server.address, "--tls-ca", "no-such-file"])


def test_the_command_asks_over_tls_and_takes_the_port_from_the_environment(
    authority: Authority, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority.issue("other")
    flags = ["--model", str(cross_encoder), "--tls-cert", str(cert), "--tls-key", str(key)]
    with ServerProcess(*flags, module="tests.holding") as process:
        assert health.main([process.address, "--tls-ca", str(authority.ca)]) == 0
        monkeypatch.setenv("RERANKER_PORT", process.address.rpartition(":")[2])
        assert health.main(["--tls-ca", str(authority.ca)]) == 0


def test_the_command_imports_nothing_that_takes_long(server: ServerProcess) -> None:
    program = f"""
import sys
sys.argv = ["health", {probed(server)!r}]
import runpy
try:
    runpy.run_module("reranker_service.commands.health", run_name="__main__")
except SystemExit as end:
    print(end.code, sorted({{"torch", "pydantic", "transformers", "structlog"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"


def test_probes_see_a_server_that_finishes_its_calls(server: ServerProcess, authority: Authority) -> None:
    """Comes last: it ends the server."""
    with channel(server.address, authority.ca, authority.issue("client")) as secured:
        call = rpc.RerankerServiceStub(secured).Rerank.future(
            pb.RerankRequest(query="word " * 100, documents=["word"]), metadata=(("authorization", f"Bearer {TOKEN}"),)
        )
        stopped = threading.Event()
        call.add_done_callback(lambda _: stopped.set())
        # The call is with the engine once an info call behind it is answered.
        rpc.RerankerServiceStub(secured).GetModelInfo(
            pb.GetModelInfoRequest(), metadata=(("authorization", f"Bearer {TOKEN}"),)
        )
        server.signal(signal.SIGTERM)
        server.line("stopping")
        assert health.main([probed(server)]) == 1
        assert not stopped.is_set()
        server.signal(RELEASE)
        assert call.result(timeout=30).results
    assert server.wait() == 0
