"""Tests of the README: its grpcurl calls against a real server, and the server's default address."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ADDRESS
from .servers import ServerProcess

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GRPCURL = Path(sys.executable).parent / "grpcurl"


def grpcurl(*arguments: str, data: str | None = None) -> str:
    result = subprocess.run(
        [str(GRPCURL), "-plaintext", *arguments], input=data, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_grpcurl_lists_the_services_by_reflection(cross_encoder_server: ServerProcess) -> None:
    found = grpcurl(cross_encoder_server.address, "list").split()
    assert {"reranker.v1.RerankerService", "grpc.health.v1.Health"} <= set(found)
    described = grpcurl(cross_encoder_server.address, "describe", "reranker.v1.RerankerService")
    assert "rpc RerankStream ( stream .reranker.v1.RerankStreamRequest )" in described


def test_grpcurl_prints_zero_indexes_and_scores(cross_encoder_server: ServerProcess) -> None:
    request = '{"query": "a", "documents": ["b"]}'
    printed = grpcurl("-d", request, cross_encoder_server.address, "reranker.v1.RerankerService/Rerank")
    (result,) = json.loads(printed)["results"]
    assert result["index"] == 0
    assert 0 <= result["score"] <= 1


def test_grpcurl_streams(cross_encoder_server: ServerProcess) -> None:
    messages = [
        {"open": {"options": {"scoreType": "SCORE_TYPE_RAW"}}},
        {"texts": {"texts": ["a query", "one", "two"]}},
        {"chunk": {"id": "0", "grid": {"queryIds": [0], "documentIds": [1, 2]}}},
        {"chunk": {"id": "1", "list": {"queryIds": [0], "documentIds": [2]}}},
    ]
    data = "\n".join(map(json.dumps, messages))
    printed = grpcurl("-d", "@", cross_encoder_server.address, "reranker.v1.RerankerService/RerankStream", data=data)
    replies = [json.loads(part) for part in re.split(r"(?<=^\})\n", printed, flags=re.MULTILINE) if part.strip()]
    results = {one["result"]["id"]: one["result"]["scores"]["values"] for one in replies if "result" in one}
    assert replies[0]["opened"]["fingerprint"]
    assert results["0"][1] == pytest.approx(results["1"][0], abs=1e-5)


def test_grpcurl_shows_what_was_wrong(cross_encoder_server: ServerProcess) -> None:
    result = subprocess.run(
        [str(GRPCURL), "-plaintext", "-d", "{}", cross_encoder_server.address, "reranker.v1.RerankerService/Rerank"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "InvalidArgument" in result.stderr
    assert "documents: there are none; give at least one document" in result.stderr


def test_the_default_address_of_the_readme_is_the_servers_own() -> None:
    from reranker_service.settings import Settings

    fields = Settings.model_fields
    assert f"{fields['host'].default}:{fields['port'].default}" == ADDRESS
    assert ADDRESS in README
