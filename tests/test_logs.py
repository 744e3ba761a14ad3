"""Logs of the server: one format for every line, whatever writes it, and no texts of requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import structlog

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.observing import logs

from .certificates import Authority, channel

NOISE = """
import asyncio, logging, subprocess, sys, threading, warnings
from reranker_service.observing.logs import adopt_handlers, configure_logs, output_of_children
own = logging.getLogger("a.library")
own.addHandler(logging.StreamHandler())
own.propagate = False
configure_logs(sys.argv[1], "info")
print("printed")
print("printed to stderr", file=sys.stderr)
sys.stderr.write("Loading:   0%\\r"); sys.stderr.write("Loading: 100%\\n\\n")
warnings.warn("warned")
logging.getLogger("another.library").warning("logged %d", 7)
logging.getLogger("another.library").info("not for this level")
late = logging.getLogger("late.library")
late.addHandler(logging.StreamHandler())
late.propagate = False
late.error("before it is adopted")
adopt_handlers()
own.error("adopted")
thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()
class Broken:
    def __del__(self): raise ValueError("in a finalizer")
Broken()
with output_of_children():
    child = subprocess.Popen([sys.executable, "-c", '''
import os, sys
os.write(1, b"(Worker pid=12) WARNING 11-25 22:52:14 [cpu_worker.py:114] of a child\\\\n")
os.write(2, b"[W1125 22:52:14.582044626 utils.cpp:68] Warning: of C++\\\\n\\\\xff\\\\n")
sys.exit("of a child's end")'''])
child.wait()
[one.join(10) for one in threading.enumerate() if one.name == "output-of-children"]
async def fail():
    asyncio.get_running_loop().call_soon(lambda: {}["in a callback"])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
asyncio.run(fail())
raise RuntimeError("nothing handles it")
"""


@pytest.mark.parametrize("form", ["json", "logfmt"])
def test_every_line_has_the_format(form: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", NOISE, form], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    if form == "logfmt":
        assert all(line.startswith("timestamp=") for line in lines), result.stderr
        return
    events = [json.loads(line) for line in lines]
    assert all({"timestamp", "level", "event"} <= set(event) for event in events)
    found = [(event["level"], event["event"]) for event in events]
    for expected in (
        ("info", "printed"),
        ("info", "printed to stderr"),
        ("info", "Loading: 100%"),
        ("warning", "logged 7"),
        ("info", "before it is adopted"),
        ("error", "adopted"),
        ("warning", "of a child"),
        ("warning", "Warning: of C++"),
        ("info", "of a child's end"),
    ):
        assert found.count(expected) == 1, (expected, found)
    written = result.stderr
    for words in ("warned", "ZeroDivisionError", "in a finalizer", "in a callback", "nothing handles it"):
        assert words in written
    assert "not for this level" not in written
    assert next(event for event in events if event["event"] == "of a child")["process"] == "Worker"


@pytest.mark.parametrize(
    ("line", "level", "event"),
    [
        ("(EngineCore pid=1) INFO 11-25 22:52:04 [core.py:133] Initializing", "info", "Initializing"),
        ("(EngineCore pid=1) CRITICAL 11-25 22:52:04 [core.py:133] Broken", "error", "Broken"),
        ("E0000 00:00:1732.1 55 server.cc:12] refused", "error", "refused"),
        ("W1125 22:52:13.860000 28296 torch/triton.py:53] none", "warning", "none"),
        ("INFO is no level here", "info", "INFO is no level here"),
    ],
)
def test_lines_of_libraries_keep_their_level(
    line: str, level: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "log", structlog.get_logger())
    with structlog.testing.capture_logs() as lines:
        logs.log_line(line)
    assert [(one["log_level"], one["event"]) for one in lines] == [(level, event)]


def test_a_server_writes_no_other_lines_and_no_texts(cross_encoder: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    cert, key = authority.issue("server")
    secret = "a secret sentence"
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--log-format", "json"]
    # A fresh interpreter: gRPC reads GRPC_VERBOSITY when it is imported.
    command = [
        sys.executable,
        "-m",
        "reranker_service",
        "--port",
        "0",
        *flags,
        "--tls-cert",
        str(cert),
        "--tls-key",
        str(key),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        lines = []
        try:
            while not lines or '"ready"' not in lines[-1]:
                lines.append(server.stdout.readline())
                assert lines[-1], lines
            address = json.loads(lines[-1])["address"]
            with channel(address, authority.ca) as open_channel:
                stub = rpc.RerankerServiceStub(open_channel)
                request = pb.RerankRequest(query=secret, documents=[secret])
                assert stub.Rerank(request, timeout=60).results
                with pytest.raises(grpc.RpcError):
                    stub.Rerank(pb.RerankRequest(query=secret), timeout=60)
            with grpc.insecure_channel(address) as open_channel, pytest.raises(grpc.RpcError):
                rpc.RerankerServiceStub(open_channel).Rerank(request, timeout=60)  # a failed handshake
        finally:
            server.terminate()
        lines += server.stdout.read().splitlines()
    events = [json.loads(line) for line in lines]
    assert all({"timestamp", "level", "event"} <= set(event) for event in events)
    assert secret not in "".join(lines)
