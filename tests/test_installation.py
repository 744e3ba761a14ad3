"""Source archive and wheel: built in isolation, installed with the lowest and newest dependencies, and used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).parent / "uv"

# Runs in each environment: a server made from the stubs, called by our own client over a real socket.
PROGRAM = """
from concurrent import futures
from importlib.util import find_spec
from pathlib import Path

import grpc
import loss_client
from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc


class Servicer(rpc.RerankerServiceServicer):
    def GetModelInfo(self, request, context):
        return pb.GetModelInfoResponse(model="installed", contract=pb.ContractVersion(major=1))

    def Rerank(self, request, context):
        response = pb.RerankResponse()
        for index, document in enumerate(request.documents):
            response.results.add(index=index, score=float(len(document)))
        return response


server = grpc.server(futures.ThreadPoolExecutor())
rpc.add_RerankerServiceServicer_to_server(Servicer(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with RerankerClient(f"127.0.0.1:{port}") as client:
    assert client.model_info().model == "installed"
    assert [one.score for one in client.rerank("q", ["a", "bb"])] == [1.0, 2.0]
server.stop(None).wait()

for module in (pb, rpc):
    assert Path(module.__file__).with_suffix(".pyi").exists()
assert (Path(loss_client.__file__).parent / "py.typed").exists()
assert (Path(find_spec("reranker_service").origin).parent / "py.typed").exists()
assert find_spec("torch") is None
"""

# Any version that the project itself will not have.
TAG = "v9.8.7"


def run(*command: str | Path, folder: Path) -> None:
    result = subprocess.run(
        [str(one) for one in command], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the source archive; both builds are isolated.

    The archive is made from a tagged copy without stubs: the build must generate them. Other tests import those here.
    """
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    for name in ("protos", "reranker_service", "loss_client"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*_pb2*", "__pycache__"))
    git = ("git", "-c", "user.name=A tester", "-c", "user.email=tester@localhost")
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "All"), ("tag", TAG)):
        run(*git, *command, folder=tree)
    run(UV, "build", "--sdist", "--out-dir", tree / "dist", tree, folder=tree)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tree / "dist", archive, folder=tree)
    return next((tree / "dist").glob("*.whl"))


def test_the_tag_gives_the_version_of_the_archive_and_of_its_wheel(wheel: Path) -> None:
    version = TAG.removeprefix("v")
    assert {one.name.split("-")[1].removesuffix(".tar.gz") for one in wheel.parent.glob("reranker_grpc-*")} == {version}


@pytest.mark.parametrize("resolution", ["lowest", "highest"])
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path, resolution: str) -> None:
    run(UV, "venv", "--python", sys.executable, tmp_path / "environment", folder=tmp_path)
    python = tmp_path / "environment" / "bin" / "python"
    run(UV, "pip", "install", "--python", python, "--resolution", resolution, wheel, folder=tmp_path)
    run(python, "-c", PROGRAM, folder=tmp_path)
