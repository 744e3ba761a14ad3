"""Build hook: generates the stubs and their types from ``protos/`` before anything is packed or linked."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = "reranker/v1/reranker.proto"


class StubsBuildHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        import google.rpc
        from grpc_tools import protoc

        root = Path(self.root) / "protos"
        installed = Path(google.rpc.__path__[0]).parents[1]  # google/rpc/status.proto; an isolated build has its own
        arguments = ["protoc", f"-I{root}", f"-I{installed}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
        arguments += [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        if protoc.main([*arguments, PROTO]) != 0:
            raise RuntimeError(f"protoc could not generate the stubs of {PROTO}; its message stands above")

    def clean(self, versions: list[str]) -> None:
        for stub in (Path(self.root) / "protos").glob("reranker/v1/*_pb2*"):
            stub.unlink()
