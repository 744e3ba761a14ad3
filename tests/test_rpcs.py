"""Every RPC gives the scores of transformers and sentence-transformers, for every kind of model."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from .servers import ServerProcess, violations

QUERIES = ["parse a date", "", "東京 naïve – text"]
DOCUMENTS = ["Parse a date from a string.", "Return the sum.", "parse a date", "", "x" * 1000, "word " * 400]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]


def stream(stub: rpc.RerankerServiceStub, chunks: list[pb.StreamChunk], **options: object) -> dict[int, list[float]]:
    """Send all texts and ``chunks`` on one stream; returns the scores by chunk id."""
    messages = [
        pb.RerankStreamRequest(open=pb.StreamOpen(options=pb.RerankOptions(**options))),
        pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[*QUERIES, *DOCUMENTS])),
        *(pb.RerankStreamRequest(chunk=chunk) for chunk in chunks),
    ]
    opened, *results = stub.RerankStream(iter(messages), timeout=60)
    assert opened.opened.fingerprint == stub.GetModelInfo(pb.GetModelInfoRequest()).fingerprint
    assert {one.result.WhichOneof("outcome") for one in results} == {"scores"}
    assert len(results) == len(chunks)
    return {one.result.id: list(one.result.scores.values) for one in results}


def through_every_rpc(stub: rpc.RerankerServiceStub, **options: object) -> dict[str, np.ndarray]:
    """Scores of ``PAIRS`` from every RPC."""
    requests = [
        pb.RerankRequest(query=query, documents=DOCUMENTS, options=pb.RerankOptions(**options)) for query in QUERIES
    ]

    def in_order(response: pb.RerankResponse) -> list[float]:
        return [one.score for one in sorted(response.results, key=lambda one: one.index)]

    queries, documents = np.arange(len(QUERIES)), len(QUERIES) + np.arange(len(DOCUMENTS))
    left, right = np.repeat(queries, len(documents)), np.tile(documents, len(queries))
    grid = pb.StreamChunk(id=7, grid=pb.PairGrid(query_ids=queries, document_ids=documents))
    halves = [
        pb.StreamChunk(id=number, list=pb.PairList(query_ids=left[part], document_ids=right[part]))
        for number, part in enumerate((slice(None, 5), slice(5, None)))
    ]
    of_halves = stream(stub, halves, **options)
    return {
        "Rerank": np.concatenate([in_order(stub.Rerank(one, timeout=60)) for one in requests]),
        "RerankBatch": np.concatenate(
            [in_order(item.response) for item in stub.RerankBatch(pb.RerankBatchRequest(requests=requests)).items]
        ),
        "grid": np.array(stream(stub, [grid], **options)[7]),
        "list": np.array(of_halves[0] + of_halves[1]),
    }


def assert_all_close(found: dict[str, np.ndarray], expected: np.ndarray) -> None:
    assert set(found) == {"Rerank", "RerankBatch", "grid", "list"}
    for way, scores in found.items():
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0, err_msg=way)


def test_cross_encoder_scores_are_sentence_transformers_own(stub: rpc.RerankerServiceStub, cross_encoder: Path) -> None:
    reference = CrossEncoder(str(cross_encoder), device="cpu").predict(PAIRS)
    assert_all_close(through_every_rpc(stub), reference)


def test_cross_encoder_raw_scores_are_logits(stub: rpc.RerankerServiceStub, cross_encoder: Path) -> None:
    import torch

    reference = CrossEncoder(str(cross_encoder), device="cpu").predict(PAIRS, activation_fn=torch.nn.Identity())
    assert np.ptp(reference) > 0.1
    assert_all_close(through_every_rpc(stub, score_type=pb.SCORE_TYPE_RAW), reference)


def test_bi_encoder_raw_scores_are_cosines(bi_encoder_server: ServerProcess, bi_encoder: Path) -> None:
    model = SentenceTransformer(str(bi_encoder), device="cpu")
    queries, documents = model.encode_query(QUERIES), model.encode_document(DOCUMENTS)
    reference = model.similarity(queries, documents).numpy().ravel()
    with grpc.insecure_channel(bi_encoder_server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        assert_all_close(through_every_rpc(stub, score_type=pb.SCORE_TYPE_RAW), reference)
        assert_all_close(through_every_rpc(stub), (1 + reference) / 2)


def test_an_instruction_changes_what_a_causal_reranker_answers(causal_reranker_server: ServerProcess) -> None:
    with grpc.insecure_channel(causal_reranker_server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        info = stub.GetModelInfo(pb.GetModelInfoRequest())
        default = through_every_rpc(stub)
        same = through_every_rpc(stub, instruction=info.default_instruction)
        other = through_every_rpc(stub, instruction="Find the opposite.")
    assert info.default_instruction.startswith("Given a web search query")
    assert_all_close(same, default["Rerank"])
    assert np.abs(other["Rerank"] - default["Rerank"]).max() > 1e-3


def test_results_are_ranked_and_cut_to_top_n(stub: rpc.RerankerServiceStub) -> None:
    request = pb.RerankRequest(query="parse", documents=DOCUMENTS, top_n=3, return_documents=True)
    response = stub.Rerank(request)
    full = stub.Rerank(pb.RerankRequest(query="parse", documents=DOCUMENTS, top_n=99))
    scores = [one.score for one in full.results]
    assert scores == sorted(scores, reverse=True)
    assert len(full.results) == len(DOCUMENTS)
    assert [one.index for one in response.results] == [one.index for one in full.results[:3]]
    assert [one.document for one in response.results] == [DOCUMENTS[one.index] for one in response.results]
    assert not full.results[0].HasField("document")


def test_equal_documents_keep_their_order(stub: rpc.RerankerServiceStub) -> None:
    response = stub.Rerank(pb.RerankRequest(query="a", documents=["same"] * 5))
    assert [one.index for one in response.results] == [0, 1, 2, 3, 4]


def test_usage_counts_pairs_tokens_and_truncated_pairs(stub: rpc.RerankerServiceStub, cross_encoder: Path) -> None:
    tokenizer = CrossEncoder(str(cross_encoder), device="cpu").tokenizer
    usage = stub.Rerank(pb.RerankRequest(query="count", documents=["a date", "word " * 400])).usage
    length = len(tokenizer("count", "a date")["input_ids"])
    longest = stub.GetModelInfo(pb.GetModelInfoRequest()).default_length
    assert (usage.pairs, usage.truncated_pairs, usage.tokens) == (2, 1, length + longest)
    assert usage.engine_seconds > 0


@pytest.mark.parametrize("kind", ["cross_encoder", "bi_encoder"])
def test_a_pair_from_the_cache_counts_as_cached_and_not_as_truncated(kind: str, request: pytest.FixtureRequest) -> None:
    server: ServerProcess = request.getfixturevalue(f"{kind}_server")
    question = pb.RerankRequest(query=f"what is cut by the {kind}?", documents=["a date", "word " * 400])
    with grpc.insecure_channel(server.address) as channel:
        first, second = (rpc.RerankerServiceStub(channel).Rerank(question).usage for _ in range(2))
    assert (first.cached_pairs, first.truncated_pairs) == (0, 1)
    assert (second.cached_pairs, second.truncated_pairs) == (2, 0)


def test_a_stream_answers_a_chunk_before_the_client_has_finished(stub: rpc.RerankerServiceStub) -> None:
    import queue

    outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
    replies = stub.RerankStream(iter(outgoing.get, None), timeout=60)
    outgoing.put(pb.RerankStreamRequest(open=pb.StreamOpen()))
    assert next(replies).WhichOneof("message") == "opened"
    for round_ in range(3):
        outgoing.put(pb.RerankStreamRequest(texts=pb.StreamTexts(texts=[f"query {round_}", f"document {round_}"])))
        outgoing.put(
            pb.RerankStreamRequest(
                chunk=pb.StreamChunk(id=round_, grid=pb.PairGrid(query_ids=[2 * round_], document_ids=[2 * round_ + 1]))
            )
        )
        assert next(replies).result.id == round_
    outgoing.put(None)
    assert list(replies) == []


def test_a_batch_keeps_options_apart(stub: rpc.RerankerServiceStub) -> None:
    requests = [
        pb.RerankRequest(query="parse", documents=["a date"], options=pb.RerankOptions(score_type=pb.SCORE_TYPE_RAW)),
        pb.RerankRequest(query="parse", documents=["a date"]),
    ]
    raw, probability = (
        item.response.results[0].score for item in stub.RerankBatch(pb.RerankBatchRequest(requests=requests)).items
    )
    assert probability == pytest.approx(1 / (1 + np.exp(-raw)), abs=1e-6)


def test_unary_replies_carry_the_fingerprint(stub: rpc.RerankerServiceStub) -> None:
    request = pb.RerankRequest(query="parse", documents=["a date"])
    fingerprint = stub.GetModelInfo(pb.GetModelInfoRequest()).fingerprint
    batch = stub.RerankBatch(pb.RerankBatchRequest(requests=[request]))
    assert stub.Rerank(request).fingerprint == batch.fingerprint == fingerprint
    assert batch.items[0].response.fingerprint == ""


def test_a_priority_that_is_unknown_fails_the_batch(stub: rpc.RerankerServiceStub) -> None:
    requests = [pb.RerankRequest(query="parse", documents=["a date"])]
    with pytest.raises(grpc.RpcError) as caught:
        stub.RerankBatch(pb.RerankBatchRequest(requests=requests, priority=9))
    assert set(violations(caught.value)) == {"priority"}
