"""The contract is compatible both ways: clients of 1.0 with this server, and this client with a server of 1.0."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2

from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.rpc.messages import CONTRACT

from . import contract_1_0 as old
from .servers import ServerProcess
from .stub_server import StubServer, hash_scores

QUERIES = ["parse a date", "naïve – text"]
DOCUMENTS = ["Parse a date from a string.", "Return the sum.", "x" * 500]


@pytest.fixture
def old_stub(cross_encoder_server: ServerProcess) -> Iterator[old.Stub]:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        yield old.Stub(channel)


@pytest.fixture
def expected(stub: rpc.RerankerServiceStub) -> np.ndarray:
    """Scores of all pairs, from this version's messages, shape (queries, documents)."""
    rankings = [stub.Rerank(pb.RerankRequest(query=query, documents=DOCUMENTS)) for query in QUERIES]
    return np.array([[one.score for one in sorted(ranking.results, key=lambda one: one.index)] for ranking in rankings])


def in_order(response: Any) -> list[float]:
    return [one.score for one in sorted(response.results, key=lambda one: one.index)]


def request(query: str) -> Any:
    return old.message("RerankRequest")(query=query, documents=DOCUMENTS)


def test_a_client_of_1_0_ranks(old_stub: old.Stub, expected: np.ndarray) -> None:
    response = old_stub.Rerank(request(QUERIES[0]))
    np.testing.assert_allclose(in_order(response), expected[0], atol=1e-5)
    assert response.usage.pairs == len(DOCUMENTS)
    assert "fingerprint" not in response.DESCRIPTOR.fields_by_name  # these are 1.0's messages


def test_a_client_of_1_0_sends_a_batch(old_stub: old.Stub, expected: np.ndarray) -> None:
    wrong = old.message("RerankRequest")(query="a")
    batch = old.message("RerankBatchRequest")(requests=[*map(request, QUERIES), wrong])
    items = old_stub.RerankBatch(batch).items
    np.testing.assert_allclose([in_order(item.response) for item in items[:2]], expected, atol=1e-5)
    assert items[2].error.code == code_pb2.INVALID_ARGUMENT


def test_a_client_of_1_0_reads_the_model_info(old_stub: old.Stub) -> None:
    info = old_stub.GetModelInfo(old.message("GetModelInfoRequest")())
    assert (info.contract.major, info.contract.minor) == (CONTRACT.major, CONTRACT.minor) == (1, 1)
    assert info.kind == old.number("MODEL_KIND_CROSS_ENCODER")
    assert info.limits.max_pairs_per_chunk == 16384


def test_a_client_of_1_0_runs_a_stream(old_stub: old.Stub, expected: np.ndarray) -> None:
    request = old.message("RerankStreamRequest")
    queries, documents = range(len(QUERIES)), range(len(QUERIES), len(QUERIES) + len(DOCUMENTS))
    grid = old.message("PairGrid")(query_ids=queries, document_ids=documents)
    pairs = old.message("PairList")(query_ids=[0, 1], document_ids=[2, 4])
    unknown = old.message("PairList")(query_ids=[0], document_ids=[99])
    chunk = old.message("StreamChunk")
    options = old.message("RerankOptions")(score_type=old.number("SCORE_TYPE_PROBABILITY"))
    messages = [
        request(open=old.message("StreamOpen")(options=options, priority=old.number("PRIORITY_INTERACTIVE"))),
        request(texts=old.message("StreamTexts")(texts=[*QUERIES, *DOCUMENTS])),
        request(chunk=chunk(id=0, grid=grid)),
        request(chunk=chunk(id=1, list=pairs)),
        request(chunk=chunk(id=2, list=unknown)),
    ]
    opened, *replies = old_stub.RerankStream(iter(messages), timeout=60)
    results = {one.result.id: one.result for one in replies}
    assert {one.WhichOneof("message") for one in replies} == {"result"}
    assert opened.opened.fingerprint
    assert opened.opened.limits.max_pairs_in_flight == 65536
    np.testing.assert_allclose(results[0].scores.values, expected.ravel(), atol=1e-5)
    np.testing.assert_allclose(results[1].scores.values, [expected[0, 0], expected[1, 2]], atol=1e-5)
    assert results[2].error.code == code_pb2.INVALID_ARGUMENT


class ServerOf1_0:
    """A server that speaks contract 1.0: it decides each answer from 1.0's messages, and sends 1.0's messages.

    The scores come from ``StubServer``: messages of the two versions that set the same fields are the same bytes.
    """

    def __init__(self, behind: str) -> None:
        self._channel = grpc.insecure_channel(behind)
        stub = old.Stub(self._channel)
        self.seen: list[Any] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])

        def unary(rpc: str) -> grpc.RpcMethodHandler[Any, Any]:
            def answer(request: Any, _: Any) -> Any:
                self.seen.append(request)
                response = getattr(stub, rpc)(request)
                if rpc == "GetModelInfo":
                    response.contract.minor = 0
                return response

            return grpc.unary_unary_rpc_method_handler(answer, **self._codecs(rpc))

        def stream(requests: Iterator[Any], _: Any) -> Iterator[Any]:
            def noted() -> Iterator[Any]:
                for request in requests:
                    # A server of 1.0 ends the stream for a message that it does not know.
                    assert request.WhichOneof("message") is not None
                    self.seen.append(request)
                    yield request

            yield from stub.RerankStream(noted())

        handlers = {name: unary(name) for name in ("Rerank", "RerankBatch", "GetModelInfo")}
        handlers["RerankStream"] = grpc.stream_stream_rpc_method_handler(stream, **self._codecs("RerankStream"))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(old.SERVICE, handlers),))
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @staticmethod
    def _codecs(rpc: str) -> dict[str, Any]:
        return {
            "request_deserializer": old.message(f"{rpc}Request").FromString,
            "response_serializer": lambda response: response.SerializeToString(),
        }

    def close(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()


@pytest.fixture
def old_server() -> Iterator[ServerOf1_0]:
    with StubServer() as behind:
        server = ServerOf1_0(behind.target)
        yield server
        server.close()


def test_this_client_scores_with_a_server_of_1_0(old_server: ServerOf1_0) -> None:
    with RerankerClient(old_server.target) as client:
        np.testing.assert_array_equal(client.score_grid(QUERIES, DOCUMENTS), hash_scores(QUERIES, DOCUMENTS))
        pairs = [(QUERIES[0], DOCUMENTS[2]), (QUERIES[1], DOCUMENTS[0])]
        scores = hash_scores(QUERIES, DOCUMENTS)
        np.testing.assert_array_equal(client.score_pairs(pairs), [scores[0, 2], scores[1, 0]])
    assert any(type(one) is old.message("RerankStreamRequest") for one in old_server.seen)


def test_this_client_ranks_and_asks_a_server_of_1_0(old_server: ServerOf1_0) -> None:
    with RerankerClient(old_server.target) as client:
        assert client.model_info().fingerprint == "stub"
        ranking = client.rerank(QUERIES[0], DOCUMENTS)
        scores = hash_scores(QUERIES[:1], DOCUMENTS)[0]
        assert [one.index for one in ranking] == np.argsort(-scores, kind="stable").tolist()
