"""Contract 1.0 as it was released: its messages, compiled into a descriptor pool of their own, and its RPCs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import google.rpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "reranker.v1.RerankerService"
_DIRECTORY = Path(__file__).parent / "contract" / "v1_0"


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    with tempfile.TemporaryDirectory() as directory:
        module, output = Path(directory) / "module", Path(directory) / "image.binpb"
        shutil.copytree(_DIRECTORY, module)
        (module / "google" / "rpc").mkdir(parents=True)
        shutil.copy(Path(google.rpc.__path__[0]) / "status.proto", module / "google" / "rpc")
        buf = Path(sys.executable).with_name("buf")
        subprocess.run([buf, "build", module, "-o", output], check=True, timeout=60)
        files = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


def message(name: str) -> Any:
    """The class of a message of contract 1.0, such as ``RerankRequest``."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"reranker.v1.{name}"))


def number(name: str) -> int:
    """Number of a value of an enum, such as ``PRIORITY_BULK``."""
    kind = {"PRIORITY": "Priority", "SCORE": "ScoreType", "OVER": "OverLong", "MODEL": "ModelKind"}
    values = _pool().FindEnumTypeByName(f"reranker.v1.{kind[name.partition('_')[0]]}").values_by_name
    return int(values[name].number)


class Stub:
    """Calls the RPCs of a channel with messages of contract 1.0 only."""

    def __init__(self, channel: Any) -> None:
        def codecs(rpc: str) -> dict[str, Any]:
            return {
                "request_serializer": lambda request: request.SerializeToString(),
                "response_deserializer": message(f"{rpc}Response").FromString,
            }

        for rpc in ("Rerank", "RerankBatch", "GetModelInfo"):
            setattr(self, rpc, channel.unary_unary(f"/{SERVICE}/{rpc}", **codecs(rpc)))
        self.RerankStream = channel.stream_stream(f"/{SERVICE}/RerankStream", **codecs("RerankStream"))
