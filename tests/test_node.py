"""The Node.js example, run against a real server: one ranking, a grid over a stream, TLS with a token, and errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import google.rpc
import numpy as np
import pytest

from loss_client import RerankerClient

from .certificates import Authority
from .pages import shell_blocks
from .servers import ServerProcess

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "node"
PACKAGES = ROOT / "build" / "node" / "node_modules"
TOKEN = "token-of-the-node-test-0123456789"
QUERIES = ["How do plants make sugar?", "capital of France", "zürich 東京 🙂"]
DOCUMENTS = ["Leaves turn light into sugar.", "Paris is a city.", "", "A document\nof two lines."]

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(not PACKAGES.is_dir(), reason="`make node` has not installed the packages of examples/node"),
]


class Secured(NamedTuple):
    """A server with TLS and a token."""

    address: str
    ca: Path


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example beside the contract and the installed packages, as `npm ci` in examples/node makes it."""
    root = tmp_path_factory.mktemp("node")
    (root / "protos").symlink_to(ROOT / "protos")
    copy = root / "examples" / "node"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("node_modules"))
    (copy / "node_modules").symlink_to(PACKAGES)
    return copy


@pytest.fixture(scope="module")
def secured(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    authority = Authority(directory)
    cert, key = authority.issue("server")
    tokens = directory / "tokens"
    tokens.write_text(f"node {TOKEN}\n")
    tokens.chmod(0o600)
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(tokens))
    with ServerProcess("--model", str(cross_encoder), "--engine", "torch", *flags) as server:
        yield Secured(server.address, authority.ca)


def node(example: Path, *arguments: str, data: str = "", security: Mapping[str, str] | None = None) -> list[str]:
    """Lines that the example prints. Raises AssertionError with its error message if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RERANKER_")}
    result = subprocess.run(
        ["node", "main.js", *arguments],
        cwd=example,
        input=data,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | dict(security or {}),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_one_ranking_has_the_order_and_the_scores_of_the_python_client(
    example: Path, cross_encoder_server: ServerProcess
) -> None:
    printed = [json.loads(line) for line in node(example, cross_encoder_server.address, QUERIES[0], *DOCUMENTS)]
    with RerankerClient(cross_encoder_server.address) as client:
        expected = client.rerank(QUERIES[0], DOCUMENTS)
    assert [one["index"] for one in printed] == [one.index for one in expected]
    assert [one["score"] for one in printed] == pytest.approx([one.score for one in expected], abs=1e-5)


def test_a_grid_over_tls_with_a_token_has_the_scores_of_the_python_client(example: Path, secured: Secured) -> None:
    security = {"RERANKER_CLIENT_TOKEN": TOKEN, "RERANKER_CLIENT_TLS_CA": str(secured.ca)}
    texts = json.dumps({"queries": QUERIES, "documents": DOCUMENTS})
    rows = node(example, f"grpcs://{secured.address}", "--grid", data=texts, security=security)
    with RerankerClient(f"grpcs://{secured.address}", token=TOKEN, root_certificates=secured.ca) as client:
        expected = client.score_grid(QUERIES, DOCUMENTS)
    np.testing.assert_allclose([json.loads(row) for row in rows], expected, atol=1e-5)


@pytest.mark.parametrize("command", shell_blocks("languages.md", "node main.js"))
def test_the_commands_of_the_page_run(
    example: Path, cross_encoder_server: ServerProcess, secured: Secured, command: str
) -> None:
    shutil.copy(secured.ca, example / "ca.pem")
    (example / "trainer.token").write_text(f"{TOKEN}\n")
    address = secured.address if "grpcs://" in command else cross_encoder_server.address
    command = command.replace("127.0.0.1:50051", address)
    result = subprocess.run(
        ["bash", "-c", command], cwd=example, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(printed) == (1 if "grpcs://" in command else 2)
    scores = printed if "--grid" in command else [[one["score"]] for one in printed]
    assert all(0 <= score <= 1 for row in scores for score in row)


def test_errors_show_status_and_message(example: Path, cross_encoder_server: ServerProcess, secured: Secured) -> None:
    with pytest.raises(AssertionError, match="INVALID_ARGUMENT: documents: there are none"):
        node(example, cross_encoder_server.address, "a query")
    with pytest.raises(AssertionError, match="UNAUTHENTICATED"):
        node(example, f"grpcs://{secured.address}", "a", "b", security={"RERANKER_CLIENT_TLS_CA": str(secured.ca)})
    with pytest.raises(AssertionError, match=r"A token needs TLS: write the address as grpcs://HOST:PORT\."):
        node(example, secured.address, "a", "b", security={"RERANKER_CLIENT_TOKEN": TOKEN})


def test_the_imported_proto_is_that_of_the_python_package() -> None:
    installed = Path(google.rpc.__path__[0]) / "status.proto"
    assert (EXAMPLE / "protos" / "google" / "rpc" / "status.proto").read_text() == installed.read_text()


def test_the_lock_names_no_registry() -> None:
    packages = json.loads((EXAMPLE / "package-lock.json").read_text())["packages"]
    assert all("integrity" in package and "resolved" not in package for name, package in packages.items() if name)
