"""Tries the built package with the lowest and the newest versions of what it needs: install, import, one real call.

Needs `uv` (in the pinned lists). Run by `make compat`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# Runs in each environment: a server made from the stubs, called by our own client over a real socket.
PROGRAM = """
from concurrent import futures
from importlib.metadata import version

import grpc
from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc


class Servicer(rpc.RerankerServiceServicer):
    def GetModelInfo(self, request, context):
        return pb.GetModelInfoResponse(model="compat", contract=pb.ContractVersion(major=1))

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
    assert client.model_info().model == "compat"
    assert [one.score for one in client.rerank("q", ["a", "bb"])] == [1.0, 2.0]
server.stop(None).wait()
print("works with", *(f"{name} {version(name)}" for name in ("grpcio", "protobuf", "numpy")))
"""


def run(*command: str | Path) -> None:
    """Run a command, and end with its output if it fails."""
    result = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False, timeout=600)
    if result.returncode:
        sys.exit(f"{' '.join(str(one) for one in command[:4])} ... failed:\n{result.stdout}{result.stderr}")
    print(result.stdout, end="", flush=True)


def main() -> None:
    """Build the wheel, then try it at both ends of the allowed range."""
    uv = Path(sys.executable).parent / "uv"
    with tempfile.TemporaryDirectory() as scratch:
        run(uv, "build", "--quiet", "--wheel", "--out-dir", scratch)
        wheel = next(Path(scratch).glob("*.whl"))
        for resolution in ("lowest", "highest"):
            environment = Path(scratch) / resolution
            run(uv, "venv", "--quiet", "--python", sys.executable, environment)
            python = environment / "bin" / "python"
            run(uv, "pip", "install", "--quiet", "--python", python, "--resolution", resolution, wheel)
            run(python, "-c", PROGRAM)


if __name__ == "__main__":
    main()
