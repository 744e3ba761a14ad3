"""The Grafana dashboard: every metric and label that it queries is on the page of a server with vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from . import models, references
from .scrapes import Scrape, scrape
from .servers import ServerProcess

DASHBOARD = json.loads((Path(__file__).parent.parent / "docs" / "grafana-dashboard.json").read_text())
KEYWORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset", "group_left", "group_right"}
# Prometheus adds this label to all metrics.
ADDED = {"instance"}
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")


@pytest.fixture(scope="module")
def page(causal_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scrape, Scrape]]:
    """The page of a vLLM server while it loads, and after some calls.

    Its model has the layout that ``test_vllm_engine`` does not run, so the scores are compared here.
    """
    converted = models.build_qwen3_reranker_converted(tmp_path_factory.mktemp("converted"))
    flags = ["--model", str(converted), "--engine", "vllm", "--metrics-port", "0"]
    with ServerProcess(*flags, ready=False) as server:
        loading = scrape(server)
        with grpc.insecure_channel(server.wait_ready()) as channel:
            stub = rpc.RerankerServiceStub(channel)
            request = pb.RerankRequest(query="a query", documents=["a document", "another"])
            response = stub.Rerank(request)
            assert response.usage.pairs == 2
            # Equal seeds give equal weights.
            pairs = [(request.query, document) for document in request.documents]
            logits = references.causal_logits(causal_reranker, pairs, None, 8192)
            found = [one.score for one in sorted(response.results, key=lambda one: one.index)]
            assert found == pytest.approx((1 / (1 + np.exp(-logits))).tolist(), abs=1e-5)
            with pytest.raises(grpc.RpcError):
                stub.Rerank(pb.RerankRequest(query="a query"))
        yield loading, scrape(server)


def panels() -> Iterator[dict]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", [])]


def names(expression: str) -> set[str]:
    """Names of metrics in a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression)
    bare = re.sub(r"\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"(?<![\w:$.])([a-zA-Z_:][\w:]*)\s*(\(?)", bare)
    return {word for word, call in words if not call and word not in KEYWORDS}


def labels(expression: str) -> set[tuple[str, str]]:
    """Metric and label, for every label that a PromQL expression matches or groups by."""
    matched = {
        (name, label)
        for name, matchers in SELECTOR.findall(expression)
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
    }
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    return matched | {
        (name, one.strip()) for name in names(expression) for group in grouped for one in group.split(",")
    }


def test_the_extraction_finds_names_and_labels() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{x=~"$y"}[$__rate_interval]))) / max(vllm:b_total{z="1"})'
    )
    assert names(expression) == {"a_bucket", "vllm:b_total"}
    assert labels(expression) == {("a_bucket", "x"), ("vllm:b_total", "z"), ("a_bucket", "le"), ("vllm:b_total", "le")}


def test_every_name_and_label_exists(page: tuple[Scrape, Scrape]) -> None:
    _, live = page
    assert len(expressions()) > 30
    for expression in expressions():
        found = names(expression)
        assert found, expression
        assert found <= live.names(), expression
        for name, label in labels(expression):
            assert label in live.labels(name) | ADDED, expression


def test_variables_query_existing_metrics_and_labels(page: tuple[Scrape, Scrape]) -> None:
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert [one["type"] for one in variables.values()].count("datasource") == 1
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == set(variables)
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["instance"]["query"]["query"])
    assert asked[1] in page[1].names()
    assert asked[2] in ADDED


def test_every_metric_of_the_server_is_shown(page: tuple[Scrape, Scrape]) -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for expression in expressions() for name in names(expression)}
    ours = {name for name in page[1].names() if name.startswith("reranker_")}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours} <= shown


def test_panels_are_whole_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_vllms_own_metrics_are_on_the_page(page: tuple[Scrape, Scrape]) -> None:
    """Every pair is a request to vLLM; two of them are the known answer that the server asks at start."""
    loading, live = page
    assert not any(name.startswith("vllm:") for name in loading.names())
    assert live["vllm:request_success_total"] == 2 + 2
    assert live["reranker_pairs_total"] == 2


def test_the_engine_is_not_up_while_the_model_loads(page: tuple[Scrape, Scrape]) -> None:
    loading, live = page
    assert (loading["reranker_engine_up"], live["reranker_engine_up"]) == (0, 1)
