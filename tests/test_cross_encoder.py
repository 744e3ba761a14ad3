"""RemoteCrossEncoder against a local CrossEncoder of the same weights, through sentence-transformers' own functions."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)
from sentence_transformers.util import mine_hard_negatives

from loss_client import ClientClosedError, RemoteCrossEncoder, RerankerClient, RerankerRequestError, ScoreError, mining
from reranker.v1 import reranker_pb2 as pb

from . import families, models
from .servers import ServerProcess
from .stub_server import Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores, numbered_texts

TOLERANCE = {"rtol": 0, "atol": 1e-5}
TEXTS = list(dict(models.summary_and_body()).items())
PAIRS = [(query, body) for (query, _), (_, body) in itertools.product(TEXTS[:5], TEXTS[:8])]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: threads of a model this small mostly wait for each other, for long if the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def local(cross_encoder: Path) -> CrossEncoder:
    return CrossEncoder(str(cross_encoder), device="cpu")


@pytest.fixture(scope="module")
def remote(cross_encoder_server: ServerProcess) -> Iterator[RemoteCrossEncoder]:
    with RemoteCrossEncoder(cross_encoder_server.address) as model:
        yield model


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


def assert_same(found: Any, expected: Any) -> None:
    """Assert equal types, dtypes and shapes, and values within the tolerance."""
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), **TOLERANCE)


# predict


@pytest.mark.parametrize(
    "inputs",
    [
        PAIRS,
        [list(pair) for pair in PAIRS[:3]],
        PAIRS[:1],
        PAIRS[0],
        list(PAIRS[0]),
        tuple(PAIRS[:2]),
        [],
        np.array(PAIRS[:4]),
        np.array(PAIRS[0]),
        Dataset.from_dict({"pair": [list(pair) for pair in PAIRS[:3]]})["pair"],
    ],
    ids=["pairs", "lists", "one in a list", "a pair", "a list", "tuple", "none", "array", "array of a pair", "column"],
)
@pytest.mark.parametrize(
    "conversion",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"convert_to_numpy": True, "convert_to_tensor": True},
    ],
    ids=["array", "tensor", "list", "both"],
)
def test_predict_returns_what_a_local_cross_encoder_returns(
    local: CrossEncoder, remote: RemoteCrossEncoder, inputs: Any, conversion: dict[str, bool]
) -> None:
    assert_same(remote.predict(inputs, **conversion), local.predict(inputs, **conversion))


def two_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return two columns, as of a model with two labels; needs the column that a CrossEncoder passes on."""
    return torch.cat([-logits, logits], dim=1)


@pytest.mark.parametrize("apply_softmax", [False, True])
@pytest.mark.parametrize(
    "activation", [None, torch.nn.Identity(), torch.nn.Sigmoid(), torch.nn.Tanh(), lambda x: 2 * x, two_classes]
)
def test_activation_functions_mean_the_same(
    local: CrossEncoder, remote: RemoteCrossEncoder, activation: Any, apply_softmax: bool
) -> None:
    options = {"activation_fn": activation, "apply_softmax": apply_softmax}
    assert_same(remote.predict(PAIRS, **options), local.predict(PAIRS, **options))
    assert_same(remote.predict(PAIRS[0], **options), local.predict(PAIRS[0], **options))


def test_the_default_activation_can_be_chosen(
    local: CrossEncoder, cross_encoder: Path, cross_encoder_server: ServerProcess
) -> None:
    raw = CrossEncoder(str(cross_encoder), device="cpu", activation_fn=torch.nn.Identity())
    with RemoteCrossEncoder(cross_encoder_server.address, activation_fn=torch.nn.Identity()) as remote:
        assert_same(remote.predict(PAIRS), raw.predict(PAIRS))
        remote.activation_fn = None
        assert_same(remote.predict(PAIRS), local.predict(PAIRS))


def test_an_activation_with_weights_leaves_no_gradient(remote: RemoteCrossEncoder) -> None:
    scores = remote.predict(PAIRS[:3], activation_fn=torch.nn.PReLU(), convert_to_tensor=True)
    assert not scores.requires_grad


@pytest.mark.parametrize("name", ["predict", "rank", "start_multi_process_pool", "stop_multi_process_pool"])
def test_arguments_have_the_same_names_order_and_defaults(name: str) -> None:
    expected = inspect.signature(getattr(CrossEncoder, name)).parameters
    if name.endswith("pool"):  # a static method of CrossEncoder has no self
        expected = {key: value for key, value in expected.items() if key != "self"}
    found = inspect.signature(getattr(RemoteCrossEncoder, name)).parameters
    defaults = [(key, each.default) for key, each in found.items() if key != "self"]
    wanted = [(key, each.default) for key, each in expected.items() if key != "self"]
    assert defaults == [each for each in wanted if each[0] != "kwargs"]


def test_a_pool_and_a_list_of_devices_are_accepted(remote: RemoteCrossEncoder) -> None:
    pool = remote.start_multi_process_pool(["cpu", "cpu"])
    found = remote.predict(PAIRS, pool=pool, chunk_size=3, convert_to_tensor=True)
    remote.stop_multi_process_pool(pool)
    assert_same(found, remote.predict(PAIRS, device=["cpu", "cpu"], convert_to_tensor=True))
    assert found.device == remote.device == torch.device("cpu")
    assert remote.predict(PAIRS[:1], device="meta", convert_to_tensor=True).device == torch.device("meta")


# Prompts and options


def test_a_prompt_goes_before_the_query_where_the_model_takes_no_instruction(
    local: CrossEncoder, cross_encoder: Path, cross_encoder_server: ServerProcess
) -> None:
    prompts = {"short": "query: ", "long": "Represent this question: "}
    expected = CrossEncoder(str(cross_encoder), device="cpu", prompts=prompts, default_prompt_name="long")
    with RemoteCrossEncoder(cross_encoder_server.address, prompts=prompts, default_prompt_name="long") as remote:
        for options in ({}, {"prompt_name": "short"}, {"prompt": "another: "}, {"prompt": ""}):
            assert_same(remote.predict(PAIRS, **options), expected.predict(PAIRS, **options))
        assert not np.allclose(remote.predict(PAIRS), local.predict(PAIRS), **TOLERANCE)
        with pytest.raises(ValueError, match=r"'none'; it has to be one of \['short', 'long'\]"):
            remote.predict(PAIRS, prompt_name="none")


def test_a_prompt_is_the_instruction_of_a_model_that_takes_one(causal_reranker_server: ServerProcess) -> None:
    with RerankerClient(causal_reranker_server.address) as client:
        plain, instructed = (client.score_pairs(PAIRS, instruction=task) for task in (None, "Find the opposite"))
        remote = RemoteCrossEncoder(client, prompts={"opposite": "Find the opposite"})
        assert_same(remote.predict(PAIRS), plain)
        assert_same(remote.predict(PAIRS, prompt_name="opposite"), instructed)
        assert_same(RemoteCrossEncoder(client, instruction="Find the opposite").predict(PAIRS), instructed)
        assert not np.allclose(plain, instructed, **TOLERANCE)


def test_activation_and_prompts_are_those_of_the_served_model(tmp_path: Path) -> None:
    prompts = {"task": "Find the body of the summary.", "other": "Find the opposite."}
    options = {"prompts": prompts, "default_prompt_name": "task", "activation_fn": torch.nn.Identity()}
    model = families.build_logit_score(tmp_path, **options)
    local = CrossEncoder(str(model), device="cpu")
    pairs = PAIRS[:10]
    with ServerProcess("--model", str(model), "--engine", "torch", "--threads", "1") as server:
        with RemoteCrossEncoder(server.address) as remote:
            for given in ({}, {"prompt_name": "other"}, {"prompt": "Find it"}, {"prompt": ""}):
                found, expected = remote.predict(pairs, **given), local.predict(pairs, **given)
                np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)
            assert np.abs(expected - 0.5).max() > 0.5  # no probabilities
            with pytest.raises(ValueError, match=r"'none'; it has to be one of \['other', 'task'\]"):
                remote.predict(pairs, prompt_name="none")


def test_a_prompt_in_place_of_one_that_the_service_adds_is_refused(remote: RemoteCrossEncoder) -> None:
    plain = remote.predict(PAIRS)
    with RemoteCrossEncoder("127.0.0.1:1", timeout=0.1) as other:
        other._client = remote._client
        other._owns_client = False
        other._info = pb.GetModelInfoResponse(
            kind=pb.MODEL_KIND_CROSS_ENCODER, prompts={"query": "q: "}, default_prompt_name="query"
        )
        assert_same(other.predict(PAIRS, prompt="q: "), plain)
        for prompt in ("", "another: "):
            with pytest.raises(ValueError, match="the service puts the model's own prompt 'q: ' before every query"):
                other.predict(PAIRS, prompt=prompt)


def test_an_instruction_for_a_model_that_takes_none_is_refused(cross_encoder_server: ServerProcess) -> None:
    with RemoteCrossEncoder(cross_encoder_server.address, instruction="Find it") as remote:
        for pairs in (PAIRS[:1], PAIRS):
            with pytest.raises(RerankerRequestError, match="takes none"):
                remote.predict(pairs)


def test_a_length_limit_is_that_of_a_local_model(cross_encoder: Path, cross_encoder_server: ServerProcess) -> None:
    short = CrossEncoder(str(cross_encoder), device="cpu", max_length=24)
    with RemoteCrossEncoder(cross_encoder_server.address, max_length=24) as remote:
        assert_same(remote.predict(PAIRS), short.predict(PAIRS))


# Errors


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("a text", TypeError, "inputs is a single str"),
        ({"query": "a", "document": "b"}, TypeError, "inputs is a single dict"),
        (["a", "b", "c"], ValueError, "inputs has 3 elements; it has to be a pair"),
        ([("a", "b"), ("a",)], ValueError, r"inputs\[1\] has 1 elements"),
        ([("a", "b"), "ab"], TypeError, r"inputs\[1\] is not a pair of a query and a document but str"),
        ([("a", "b"), ("a", None)], TypeError, r"inputs\[1\]\[1\] is not a string but NoneType"),
        ([(3, "b")], TypeError, r"inputs\[0\]\[0\] is not a string but int"),
        (np.zeros((2, 2)), TypeError, r"inputs\[0\]\[0\] is not a string but float"),
        ([("a", "\ud800")], ValueError, "UTF-8"),
    ],
)
def test_what_is_no_pair_of_strings_is_refused(
    remote: RemoteCrossEncoder, inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        remote.predict(inputs)


def test_arguments_that_cannot_work_are_refused(remote: RemoteCrossEncoder, server: StubServer) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        remote.predict(PAIRS, batch_size=0)
    with pytest.raises(TypeError, match="documents is a single str"):
        remote.rank("query", "document")
    with pytest.raises(TypeError, match=r"documents\[1\] is not a string but int"):
        remote.rank("query", ["document", 2])
    with pytest.raises(TypeError, match="query is not a string but list"):
        remote.rank(["query"], ["document"])
    for options, message in (
        ({"priority": "high"}, "'high'"),
        ({"timeout": 0.0}, "timeout must be greater than 0"),
        ({"default_prompt_name": "query"}, "has to be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            RemoteCrossEncoder(server.target, **options)


def test_no_pairs_need_no_service() -> None:
    with RemoteCrossEncoder("127.0.0.1:1", timeout=0.1) as remote:
        assert remote.predict([], convert_to_numpy=False) == []
        assert remote.rank("query", []) == []


def test_a_ranking_that_leaves_documents_out_is_refused(server: StubServer) -> None:
    async def short(request: Any) -> Any:
        return pb.RerankResponse(results=[pb.RerankResult(index=1, score=0.5)])

    server.on_request = short
    with RemoteCrossEncoder(server.target) as remote, pytest.raises(ScoreError, match="no score for 2 of 3 documents"):
        remote.predict([("q", "a"), ("q", "b"), ("q", "c")])


# rank


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"top_k": 0},
        {"top_k": 100, "return_documents": True},
        {"activation_fn": torch.nn.Identity()},
        {"prompt": "query: "},
    ],
)
def test_rank_returns_what_a_local_cross_encoder_returns(
    local: CrossEncoder, remote: RemoteCrossEncoder, options: dict[str, Any]
) -> None:
    query, documents = TEXTS[0][0], [body for _, body in TEXTS[:12]]
    found, expected = (model.rank(query, documents, **options) for model in (remote, local))
    assert [list(one) for one in found] == [list(one) for one in expected]
    assert [one["corpus_id"] for one in found] == [one["corpus_id"] for one in expected]
    assert [one.get("text") for one in found] == [one.get("text") for one in expected]
    scores = [[one["score"] for one in results] for results in (found, expected)]
    np.testing.assert_allclose(*scores, **TOLERANCE)
    assert all(type(one["score"]) is float for one in found)


def test_equal_scores_keep_the_order_of_the_documents(server: StubServer) -> None:
    with RemoteCrossEncoder(server.target) as remote:
        found = remote.rank("query", ["same", "other", "same", "same"])
    same = [one["corpus_id"] for one in found if one["corpus_id"] != 1]
    assert same == [0, 2, 3]


# sentence-transformers' own functions


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    queries, bodies = zip(*TEXTS[:24], strict=True)
    # One query with two positives, and one body that is the positive of two queries.
    return Dataset.from_dict(
        {"query": [*queries, queries[0], TEXTS[30][0]], "answer": [*bodies, TEXTS[31][1], bodies[3]]}
    )


@pytest.mark.parametrize(
    ("output_format", "options"),
    [
        ("triplet", {"absolute_margin": 0.01}),
        ("n-tuple", {"relative_margin": 0.05, "num_negatives": 2}),
        ("labeled-pair", {"max_score": 0.5, "min_score": 0.01, "range_min": 2, "range_max": 12}),
        (
            "labeled-list",
            {"absolute_margin": 0.0, "use_multi_process": True, "corpus": [body for _, body in TEXTS[24:60]]},
        ),
    ],
)
def test_mined_hard_negatives_are_the_same(
    local: CrossEncoder,
    remote: RemoteCrossEncoder,
    bi_encoder: Path,
    dataset: Dataset,
    output_format: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SentenceTransformer(str(bi_encoder), device="cpu")
    # No processes for the embeddings or for the local model: the test is about the scores.
    for each in (model, local):
        monkeypatch.setattr(type(each), "start_multi_process_pool", lambda *_, **__: None)
        monkeypatch.setattr(type(each), "stop_multi_process_pool", lambda *_: None)
    common = {key: value for key, value in options.items() if key in ("num_negatives", "corpus")}
    found, expected, unfiltered = (
        mine_hard_negatives(
            dataset, model, cross_encoder=each, output_format=output_format, output_scores=True, verbose=False, **more
        ).to_dict()
        for each, more in ((remote, options), (local, options), (None, common))
    )
    (name,) = {"score", "scores"} & set(expected)
    scores, expected_scores, _ = (each.pop(name) for each in (found, expected, unfiltered))
    np.testing.assert_allclose(list(flattened(scores)), list(flattened(expected_scores)), **TOLERANCE)
    assert found == expected
    assert len(expected["query"]) > 5
    assert expected != unfiltered


@pytest.mark.parametrize(
    "options", [{"relative_margin": 0.05}, {"absolute_margin": 0.0, "sampling_strategy": "random"}]
)
def test_mining_in_streams_gives_the_same_with_few_streams(
    server: StubServer, bi_encoder: Path, dataset: Dataset, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "_PAIRS_AT_ONCE", 200)
    model = SentenceTransformer(str(bi_encoder), device="cpu")
    options = {**options, "num_negatives": 2, "range_max": 10, "output_scores": True, "verbose": False}
    with RemoteCrossEncoder(server.target, priority="bulk") as remote:
        random.seed(0)
        expected = mine_hard_negatives(dataset, model, cross_encoder=remote, **options)
        each = len(server.streams)
        random.seed(0)
        found = mining.mine_hard_negatives(dataset, model, cross_encoder=remote, **options)
    assert found.to_dict() == expected.to_dict()
    assert len(expected) > 5
    assert each == 26  # 25 queries, and the positives
    assert len(server.streams) - each == 2  # 25 queries of 12 candidates


def test_mining_in_streams_needs_a_bound(bi_encoder: Path, dataset: Dataset, server: StubServer) -> None:
    with RemoteCrossEncoder(server.target) as remote, pytest.raises(ValueError, match="only with a margin"):
        mining.mine_hard_negatives(dataset, None, cross_encoder=remote, num_negatives=2)


def flattened(values: Any) -> Iterator[float]:
    for value in values:
        if isinstance(value, list):
            yield from flattened(value)
        else:
            yield value


def reranking() -> CrossEncoderRerankingEvaluator:
    samples = [
        {"query": query, "positive": [body], "documents": [other for _, other in TEXTS[start : start + 10]]}
        for start, (query, body) in enumerate(TEXTS[:12])
    ]
    return CrossEncoderRerankingEvaluator(samples, at_k=3, name="docs", write_csv=False)


def reranking_of_negatives() -> CrossEncoderRerankingEvaluator:
    samples = [
        {"query": query, "positive": [body], "negative": [other for _, other in TEXTS[start + 1 : start + 9]]}
        for start, (query, body) in enumerate(TEXTS[:12])
    ]
    return CrossEncoderRerankingEvaluator(samples, write_csv=False)


def classification() -> CrossEncoderClassificationEvaluator:
    return CrossEncoderClassificationEvaluator(
        [list(pair) for pair in PAIRS], [index % 3 == 0 for index in range(len(PAIRS))], name="labels", write_csv=False
    )


def correlation() -> CrossEncoderCorrelationEvaluator:
    return CrossEncoderCorrelationEvaluator(
        [list(pair) for pair in PAIRS], [index % 7 / 7 for index in range(len(PAIRS))], write_csv=False
    )


@pytest.mark.parametrize("make", [reranking, reranking_of_negatives, classification, correlation])
def test_evaluators_find_the_same(local: CrossEncoder, remote: RemoteCrossEncoder, make: Callable[[], Any]) -> None:
    evaluator = make()
    found, expected = evaluator(remote), evaluator(local)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), **TOLERANCE)
    assert evaluator in remote.model_card_data.eval_results_dict


# Calls to the service


def test_one_query_is_one_unary_call_and_more_are_one_bulk_stream(server: StubServer) -> None:
    one = [("query", text) for text in numbered_texts("document", 128)]
    several = [*one, ("another", "document")]
    with RemoteCrossEncoder(server.target) as remote:
        np.testing.assert_array_equal(remote.predict(one), hash_scores(["query"], [text for _, text in one])[0])
        assert (len(server.requests), len(server.streams)) == (1, 0)
        remote.predict(several)
        remote.predict([*one, ("query", "one too many")])
        assert (len(server.requests), len(server.streams)) == (1, 2)
        assert {stream.open.priority for stream in server.streams} == {pb.PRIORITY_BULK}


@pytest.mark.parametrize(
    ("priority", "requests", "level"),
    [("bulk", 0, pb.PRIORITY_BULK), ("interactive", 1, pb.PRIORITY_INTERACTIVE)],
)
def test_a_named_priority_holds_for_every_call(server: StubServer, priority: Any, requests: int, level: Any) -> None:
    with RemoteCrossEncoder(server.target, priority=priority) as remote:
        remote.predict([("query", "document")])
        remote.predict([("query", "document"), ("another", "document")])
    assert len(server.requests) == requests
    assert {stream.open.priority for stream in server.streams} == {level}


def test_options_reach_the_server_whichever_way_it_is_asked(server: StubServer) -> None:
    expected = pb.RerankOptions(instruction="task", max_length=77, score_type=pb.SCORE_TYPE_RAW)
    with RemoteCrossEncoder(
        server.target, instruction="task", max_length=77, activation_fn=torch.nn.Identity()
    ) as remote:
        remote.predict(("query", "document"))
        remote.predict([("query", "document"), ("another", "document")])
    assert server.requests[0].options == expected
    assert server.streams[0].open.options == expected


def test_limits_of_a_request_are_no_limits_of_a_call(cross_encoder: Path, local: CrossEncoder) -> None:
    limit = ("--limits.max-documents-per-request", "4")
    with ServerProcess("--model", str(cross_encoder), "--engine", "torch", "--threads", "1", *limit) as server:
        with RemoteCrossEncoder(server.address) as remote:
            pairs = [(TEXTS[0][0], body) for _, body in TEXTS[:9]]
            assert_same(remote.predict(pairs), local.predict(pairs))


def test_the_progress_bar_moves_as_scores_arrive(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, moves = Gate(), []

    class Bar:
        def __init__(self, total: int, disable: bool, **_: Any) -> None:
            moves.append((total, disable))

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            moves.append(count)
            gate.open()

    async def wait(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if chunk.number > 0:
            await gate.wait()  # further scores only after the bar has moved

    server.on_chunk = wait
    monkeypatch.setattr("loss_client.cross_encoder.tqdm", Bar)
    pairs = list(itertools.product(numbered_texts("query", 6), numbered_texts("document", 50)))
    with RemoteCrossEncoder(server.target, timeout=20) as remote:
        remote.predict(pairs, show_progress_bar=True)
        assert moves[0] == (300, False)
        assert len(moves) > 3
        assert sum(moves[1:]) == 300
        moves.clear()
        remote.predict(pairs[:50])
        assert moves == [(50, True), 50]


def test_an_interrupted_call_ends_its_job(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupt:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            raise KeyboardInterrupt

    async def first_only(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if chunk.number > 0:
            await asyncio.Event().wait()

    server.on_chunk = first_only
    monkeypatch.setattr("loss_client.cross_encoder.tqdm", Interrupt)
    pairs = list(itertools.product(numbered_texts("query", 6), numbered_texts("document", 50)))
    with RemoteCrossEncoder(server.target) as remote:
        with pytest.raises(KeyboardInterrupt):
            remote.predict(pairs, show_progress_bar=True)
        server.wait_for(lambda: server.streams[0].ended, "the server to see the end of the job")


# Closing and copying


def test_it_closes_its_own_client_and_no_other(server: StubServer) -> None:
    with RerankerClient(server.target) as client:
        with RemoteCrossEncoder(client) as remote:
            remote.predict([("query", "document")])
        assert len(client.rerank("query", ["document"])) == 1
    with RemoteCrossEncoder([server.target]) as remote:
        remote.predict([("query", "document")])
    with pytest.raises(ClientClosedError):
        remote.predict([("query", "document")])


def test_a_copy_from_a_pickle_connects_by_itself(server: StubServer) -> None:
    with RemoteCrossEncoder(server.target, activation_fn=torch.nn.Identity(), max_length=77) as remote:
        expected = remote.predict(PAIRS)
        text = pickle.dumps(remote)
    with pickle.loads(text) as copy:
        assert_same(copy.predict(PAIRS), expected)
