"""Bad input fails with the right status, and with a message that names field, value and rule."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc
import pytest

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from .servers import ServerProcess, violations, violations_of

OPEN = pb.RerankStreamRequest(open=pb.StreamOpen())
TEXTS = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["a query", "a document"]))
GOOD = pb.RerankStreamRequest(chunk=pb.StreamChunk(id=1, grid=pb.PairGrid(query_ids=[0], document_ids=[1])))
LONG = "word " * 500


@pytest.fixture(scope="module")
def small_limits(cross_encoder: object) -> Iterator[rpc.RerankerServiceStub]:
    """A server with small limits, so that tests can exceed them."""
    flags = [
        f"--limits.{name}={value}"
        for name, value in {
            "max-text-bytes": 100,
            "max-documents-per-request": 3,
            "max-requests-per-batch": 2,
            "max-pairs-per-batch": 4,
            "max-pairs-per-chunk": 4,
            "max-texts-per-stream": 5,
            "max-text-bytes-per-stream": 250,
            "max-chunks-per-stream": 2,
            "max-message-bytes": 65536,
        }.items()
    ]
    with ServerProcess("--model", str(cross_encoder), "--engine", "torch", "--threads", "1", *flags) as server:
        with grpc.insecure_channel(server.address) as channel:
            yield rpc.RerankerServiceStub(channel)


def refused(call: object, *arguments: object) -> dict[str, str]:
    """Violations of a call that must fail with INVALID_ARGUMENT; its message must contain all of them."""

    def make_the_call() -> None:
        result = call(*arguments, timeout=30)
        if isinstance(result, grpc.Call):
            list(result)

    with pytest.raises(grpc.RpcError) as caught:
        make_the_call()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value
    found = violations(caught.value)
    for field, description in found.items():
        assert f"{field}: {description}" in caught.value.details()
    return found


def test_a_status_names_as_many_violations_as_headers_have_room_for(cross_encoder: object) -> None:
    most = 100_000
    documents = ["a document", *["x" * (most + 1)] * 50]
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--limits.max-text-bytes", str(most)]
    with ServerProcess(*flags) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rpc.RerankerServiceStub(channel).Rerank(pb.RerankRequest(query="a", documents=documents), timeout=60)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    told = violations(caught.value)
    assert list(told)[:2] == ["documents[1]", "documents[2]"]
    assert 2 < len(told) < 50
    assert caught.value.details().endswith(f"; and {50 - len(told)} more")


def test_more_calls_than_the_server_takes_are_refused_at_once(cross_encoder: object) -> None:
    flags = ["--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--max-concurrent-rpcs", "1"]
    with ServerProcess(*flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        outgoing: queue.SimpleQueue[pb.RerankStreamRequest | None] = queue.SimpleQueue()
        outgoing.put(OPEN)
        call = stub.RerankStream(iter(outgoing.get, None))
        assert next(call).HasField("opened")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Rerank(pb.RerankRequest(query="a", documents=["b"]), timeout=30)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        outgoing.put(None)
        assert list(call) == []


def rerank(**fields: object) -> pb.RerankRequest:
    return pb.RerankRequest(**{"query": "a", "documents": ["b"], **fields})


def options(**fields: object) -> pb.RerankRequest:
    return rerank(options=pb.RerankOptions(**fields))


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (pb.RerankRequest(query="a"), "documents", "none"),
        (rerank(top_n=0), "top_n", "is 0"),
        (options(max_length=0), "options.max_length", "is 0; the served model takes"),
        (options(max_length=100000), "options.max_length", "is 100000"),
        (options(score_type=9), "options.score_type", "is 9"),
        (options(over_long=9), "options.over_long", "OVER_LONG_REJECT"),
        (options(instruction="x"), "options.instruction", "takes none"),
        (options(instruction=""), "options.instruction", "takes none"),
        (
            pb.RerankRequest(query="a", documents=[LONG], options=pb.RerankOptions(over_long=pb.OVER_LONG_REJECT)),
            "options.over_long",
            "the limit is",
        ),
    ],
)
def test_a_wrong_rerank_request(
    stub: rpc.RerankerServiceStub, request_: pb.RerankRequest, field: str, words: str
) -> None:
    found = refused(stub.Rerank, request_)
    assert list(found) == [field]
    assert words in found[field]


def test_an_error_names_all_broken_rules(stub: rpc.RerankerServiceStub) -> None:
    request = rerank(documents=[], top_n=0, options=pb.RerankOptions(score_type=9, instruction="x"))
    assert set(refused(stub.Rerank, request)) == {"documents", "top_n", "options.score_type", "options.instruction"}


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (rerank(query="é" * 51), "query", "is 102 bytes long; the limit of one text is 100"),
        (rerank(documents=["b", "x" * 101]), "documents[1]", "is 101 bytes"),
        (rerank(documents=["b"] * 4), "documents", "there are 4; the limit of one request is 3"),
    ],
)
def test_limits_of_a_request(
    small_limits: rpc.RerankerServiceStub, request_: pb.RerankRequest, field: str, words: str
) -> None:
    found = refused(small_limits.Rerank, request_)
    assert list(found) == [field]
    assert words in found[field]


def test_values_at_a_limit_are_accepted(small_limits: rpc.RerankerServiceStub) -> None:
    assert len(small_limits.Rerank(rerank(query="é" * 50, documents=["b", "c", "x" * 100])).results) == 3


def test_a_message_over_the_size_limit(small_limits: rpc.RerankerServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        small_limits.Rerank(rerank(query="x" * 70000))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_limits_of_a_batch(small_limits: rpc.RerankerServiceStub) -> None:
    three = pb.RerankBatchRequest(requests=[rerank()] * 3)
    assert "there are 3" in refused(small_limits.RerankBatch, three)["requests"]
    many = pb.RerankBatchRequest(requests=[rerank(documents=["b"] * 3)] * 2)
    assert "6 documents together" in refused(small_limits.RerankBatch, many)["requests"]
    assert "none" in refused(small_limits.RerankBatch, pb.RerankBatchRequest())["requests"]


def test_one_wrong_request_of_a_batch_fails_alone(stub: rpc.RerankerServiceStub) -> None:
    requests = [rerank(), rerank(top_n=0), rerank(documents=["c", "d"])]
    first, second, third = stub.RerankBatch(pb.RerankBatchRequest(requests=requests)).items
    assert len(first.response.results) == 1
    assert len(third.response.results) == 2
    assert second.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert list(violations_of(second.error)) == ["requests[1].top_n"]


@pytest.mark.parametrize("method", ["Rerank", "RerankBatch", "GetModelInfo"])
def test_bytes_that_are_no_message(cross_encoder_server: ServerProcess, method: str) -> None:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        call = channel.unary_unary(f"/reranker.v1.RerankerService/{method}")
        # Field 1 is a string of two bytes that are not UTF-8. GetModelInfo has no fields: its message is cut short.
        data = b"\x0a" if method == "GetModelInfo" else b"\x0a\x02\xc3\x28"
        found = refused(call, data)
    assert "UTF-8" in found["message"]


@pytest.mark.parametrize(
    "method",
    [
        *("grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"),
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
@pytest.mark.parametrize(
    ("data", "words"), [(b"\x0a\x02\xc3\x28", "UTF-8"), (b"\x0a\x88\x27" + b"x" * 5000, "limit is 4096")]
)
def test_health_and_reflection_refuse_what_is_no_message_of_theirs(
    cross_encoder_server: ServerProcess, method: str, data: bytes, words: str
) -> None:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        call = channel.stream_stream(f"/{method}")
        found = refused(call, iter([data]))
    assert words in found["message"]


def test_a_stream_message_that_is_no_message(cross_encoder_server: ServerProcess) -> None:
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        call = channel.stream_stream("/reranker.v1.RerankerService/RerankStream")
        found = refused(call, iter([OPEN.SerializeToString(), b"\x12\x04\x0a\x02\xc3\x28"]))
    assert "UTF-8" in found["message"]


@pytest.mark.parametrize(
    ("messages", "field", "words"),
    [
        ([GOOD], "chunk", "before open"),
        ([TEXTS], "texts", "before open"),
        ([pb.RerankStreamRequest()], "message", "before open"),
        ([OPEN, OPEN], "open", "second time"),
        ([OPEN, pb.RerankStreamRequest()], "message", "not set"),
        ([OPEN, pb.RerankStreamRequest(texts=pb.StreamTexts())], "texts.texts", "none"),
        ([OPEN, TEXTS, GOOD, GOOD], "chunk.id", "is 1, as was an earlier chunk's"),
        ([pb.RerankStreamRequest(open=pb.StreamOpen(priority=9))], "open.priority", "is 9"),
        (
            [pb.RerankStreamRequest(open=pb.StreamOpen(options=pb.RerankOptions(instruction="x")))],
            "open.options.instruction",
            "takes none",
        ),
    ],
)
def test_a_broken_protocol_ends_the_stream(
    stub: rpc.RerankerServiceStub, messages: list[pb.RerankStreamRequest], field: str, words: str
) -> None:
    found = refused(stub.RerankStream, iter(messages))
    assert list(found) == [field]
    assert words in found[field]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["a"] * 6))], "would hold 6 texts"),
        ([pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["x" * 90]))] * 3, "would hold 270 bytes"),
    ],
)
def test_limits_of_a_streams_texts(
    small_limits: rpc.RerankerServiceStub, messages: list[pb.RerankStreamRequest], words: str
) -> None:
    assert words in refused(small_limits.RerankStream, iter([OPEN, *messages]))["texts.texts"]


def test_the_limit_of_chunks_in_a_stream(small_limits: rpc.RerankerServiceStub) -> None:
    def chunk(number: int) -> pb.RerankStreamRequest:
        return pb.RerankStreamRequest(
            chunk=pb.StreamChunk(id=number, grid=pb.PairGrid(query_ids=[0], document_ids=[1]))
        )

    found = refused(small_limits.RerankStream, iter([OPEN, TEXTS, chunk(1), chunk(2), chunk(3)]))
    assert "one more than 2" in found["chunk"]


@pytest.mark.parametrize(
    ("chunk", "field", "words"),
    [
        (pb.StreamChunk(id=5), "chunk.pairs", "not set"),
        (pb.StreamChunk(id=5, grid=pb.PairGrid(document_ids=[1])), "chunk.grid.query_ids", "none"),
        (pb.StreamChunk(id=5, grid=pb.PairGrid(query_ids=[0])), "chunk.grid.document_ids", "none"),
        (
            pb.StreamChunk(id=5, grid=pb.PairGrid(query_ids=[0, 2], document_ids=[1])),
            "chunk.grid.query_ids[1]",
            "is text id 2, but only 2 texts were sent",
        ),
        (
            pb.StreamChunk(id=5, list=pb.PairList(query_ids=[0], document_ids=[4294967295])),
            "chunk.list.document_ids[0]",
            "4294967295",
        ),
        (
            pb.StreamChunk(id=5, list=pb.PairList(query_ids=[0, 0], document_ids=[1])),
            "chunk.list.document_ids",
            "there are 1, but 2 query_ids",
        ),
        (
            pb.StreamChunk(id=5, grid=pb.PairGrid(query_ids=[0] * 5, document_ids=[1])),
            "chunk.grid",
            "holds 5 pairs; the limit of one chunk is 4",
        ),
    ],
)
def test_a_wrong_chunk_fails_alone(
    small_limits: rpc.RerankerServiceStub, chunk: pb.StreamChunk, field: str, words: str
) -> None:
    messages = [OPEN, TEXTS, pb.RerankStreamRequest(chunk=chunk), GOOD]
    replies = {one.result.id: one.result for one in small_limits.RerankStream(iter(messages)) if one.HasField("result")}
    assert len(replies[1].scores.values) == 1
    assert replies[5].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    found = violations_of(replies[5].error)
    assert list(found) == [field]
    assert words in found[field]


def test_an_over_long_pair_fails_only_its_chunk_if_the_options_reject_it(stub: rpc.RerankerServiceStub) -> None:
    reject = pb.RerankOptions(over_long=pb.OVER_LONG_REJECT)
    messages = [
        pb.RerankStreamRequest(open=pb.StreamOpen(options=reject)),
        pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["a query", "a document", LONG])),
        GOOD,
        pb.RerankStreamRequest(chunk=pb.StreamChunk(id=2, grid=pb.PairGrid(query_ids=[0], document_ids=[1, 2]))),
    ]
    replies = {one.result.id: one.result for one in stub.RerankStream(iter(messages)) if one.HasField("result")}
    assert len(replies[1].scores.values) == 1
    assert "too long" in violations_of(replies[2].error)["options.over_long"]


def test_an_over_long_text_of_a_bi_encoder_fails_if_the_options_reject_it(bi_encoder_server: ServerProcess) -> None:
    request = rerank(documents=[LONG], options=pb.RerankOptions(over_long=pb.OVER_LONG_REJECT))
    with grpc.insecure_channel(bi_encoder_server.address) as channel:
        assert "too long" in refused(rpc.RerankerServiceStub(channel).Rerank, request)["options.over_long"]


def test_the_server_still_answers(stub: rpc.RerankerServiceStub) -> None:
    """Runs after all bad input above."""
    assert len(stub.Rerank(rerank()).results) == 1


def test_an_instruction_that_leaves_no_room_for_the_texts(causal_reranker_server: ServerProcess) -> None:
    with grpc.insecure_channel(causal_reranker_server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        least = stub.GetModelInfo(pb.GetModelInfoRequest()).min_length
        options = pb.RerankOptions(instruction="word " * 100, max_length=least + 10)
        found = refused(stub.Rerank, rerank(documents=[LONG], options=options))
    assert "leaves no room" in found["options.max_length"]
