"""The loss is exact with models of every kind, precision and accumulation; its memory is bounded; failures end it.

The reference sums over pairs: it decides for each pair from the scores whether it is masked, and its gradients come
from ordinary autograd.
"""

from __future__ import annotations

import copy
import gc
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
from torch import Tensor, nn

from loss_client import IncompatibleServerError, RerankerClient, ScoreMatrix
from loss_client.callbacks import RerankerMarginCallback
from loss_client.collator import RerankerDataCollator
from loss_client.loss import RerankerCachedGISTEmbedLoss
from reranker.v1 import reranker_pb2 as pb

from .models import wordpiece_tokenizer
from .stub_server import WAIT_SECONDS, Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores
from .test_prefetch import arguments, batch_of
from .training import (
    MemoryScorer,
    Score,
    assert_same_gradients,
    cosines_of,
    dataset,
    features,
    gradients,
    guide,
    loss_and_gradients,
    random_scores,
    student,
    texts,
)

MARGIN, TEMPERATURE = 0.1, 0.05
BOTH: dict[str, Any] = {"contrast_anchors": True, "contrast_positives": True}
# With top_p this close to 1 every candidate is scored.
NUCLEUS: dict[str, Any] = {"candidates": "nearest", "top_p": 1 - 1e-12}
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "nucleus": NUCLEUS,
    "all, contrast known": BOTH,
    "nucleus, contrast by scores": {**NUCLEUS, **BOTH, "contrast_filter": "scores"},
}


@pytest.fixture
def model(shared_model: SentenceTransformer) -> SentenceTransformer:
    """Return a new student, dropout off."""
    return copy.deepcopy(shared_model).eval()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


def make(model: Any, scorer: Any, **options: Any) -> RerankerCachedGISTEmbedLoss:
    defaults: dict[str, Any] = {
        "temperature": TEMPERATURE, "margin": MARGIN, "score_type": "raw", "mini_batch_size": 3
    }  # fmt: skip
    return RerankerCachedGISTEmbedLoss(model, scorer, **{**defaults, **options})


def batch(rows: int = 6) -> list[list[str]]:
    """Three columns with a repeated anchor, a repeated positive, and a negative that is another row's positive."""
    columns = texts(3, rows)
    columns[0][-1], columns[1][-2], columns[2][0] = columns[0][0], columns[1][1], columns[1][2]
    return columns


def pairwise(
    embedded: Sequence[Tensor],
    columns: Sequence[Sequence[str]],
    score: Score,
    *,
    contrast_anchors: bool = False,
    contrast_positives: bool = False,
    contrast_filter: str = "known",
    **_: Any,
) -> Tensor:
    """Compute the loss from its definition, pair by pair.

    Args:
        embedded: The columns' embeddings, each of shape ``(rows, dim)``.
        columns: Their texts.
        score: The reranker.
        contrast_anchors: As in the loss.
        contrast_positives: As in the loss.
        contrast_filter: As in the loss.

    Returns:
        The mean over the rows, differentiable.
    """
    anchors, positives, *negatives = columns
    rows = range(len(anchors))
    every = list(dict.fromkeys(text for column in columns for text in column))
    table = score(every, every)
    position = {text: number for number, text in enumerate(every)}

    def above(query: str, document: str, row: int) -> bool:
        limit = table[position[anchors[row]], position[positives[row]]] - np.float32(MARGIN)
        return bool(table[position[query], position[document]] > limit)

    def relevant(row: int, document: str) -> bool:
        labelled = {positives[other] for other in rows if anchors[other] == anchors[row]}
        return document in labelled or above(anchors[row], document, row)

    def related(row: int, other: int) -> bool:
        same = row == other or anchors[row] == anchors[other]
        return same or relevant(row, positives[other]) or relevant(other, positives[row])

    exact = torch.cat([column.to(torch.promote_types(column.dtype, torch.float32)) for column in embedded])
    units = nn.functional.normalize(exact)
    logits = units @ units.T / TEMPERATURE  # of every text of the batch with every other, column after column
    losses = []
    for row in rows:
        kept = [(0, 1, row)]
        kept += [(0, 1, other) for other in rows if other != row and not relevant(row, positives[other])]
        for number, column in enumerate(negatives, start=2):
            kept += [(0, number, other) for other in rows if not relevant(row, column[other])]
        for wanted, side in ((contrast_anchors, 0), (contrast_positives, 1)):
            for other in rows if wanted else ():
                text, theirs = columns[side][row], columns[side][other]
                by_scores = text == theirs or above(text, theirs, row)
                if not (related(row, other) if contrast_filter == "known" else by_scores):
                    kept.append((side, side, other))
        count = len(anchors)
        pairs = [(left * count + row, right * count + other) for left, right, other in kept]
        mine = logits[tuple(torch.tensor(pairs).T)]
        losses.append(torch.logsumexp(mine, 0) - mine[0])
    return torch.stack(losses).mean()


def embeddings(model: Any, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Return the embeddings of a batch's columns, each column embedded at once."""
    taken = [{key: value for key, value in column.items() if key != "raw_text"} for column in inputs]
    return [model(column)["sentence_embedding"] for column in taken]


def expected_of(
    model: SentenceTransformer,
    inputs: Sequence[dict[str, Any]],
    columns: Sequence[Sequence[str]],
    score: Score | None = None,
    **options: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Return the reference's value and gradients."""
    model.zero_grad()
    value = pairwise(embeddings(model, inputs), columns, score or random_scores(), **options)
    if value.requires_grad:
        value.backward()
    found = gradients(model)
    model.zero_grad()
    return float(value.detach()), found


def assert_exact(
    model: SentenceTransformer,
    variant: dict[str, Any],
    *,
    wrapped: Any = None,
    inputs: list[dict[str, Any]] | None = None,
    columns: list[list[str]] | None = None,
) -> dict[str, Tensor]:
    """Assert that the loss over a model, or over its wrapper, equals the reference; return the gradients."""
    columns = columns or batch()
    inputs = inputs or features(model, columns)
    expected = expected_of(model, inputs, columns, **variant)
    loss = make(model if wrapped is None else wrapped, MemoryScorer(random_scores()), **variant)
    value = loss(inputs, None)
    value.backward()
    found = gradients(model)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(expected[0], abs=1e-5)
    assert found.keys() == expected[1].keys()
    if found:
        assert_same_gradients(found, expected[1])
    assert loss.statistics.masked_negatives > 0
    model.zero_grad()
    return found


# Models


def freeze(model: SentenceTransformer, trained: str) -> set[str]:
    """Freeze parameters without ``trained`` in their names; return the other names that embeddings depend on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return {name for name, parameter in model.named_parameters() if trained in name and "pooler" not in name}


@pytest.mark.parametrize("trained", ["encoder.layer.1.", "bias"])
def test_partly_frozen_models(model: SentenceTransformer, variant: dict[str, Any], trained: str) -> None:
    names = freeze(model, trained)
    assert assert_exact(model, variant).keys() == names != set()


def test_a_model_that_is_frozen_as_a_whole(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    freeze(model, "nothing has this name")
    assert assert_exact(model, variant) == {}


def test_adapters(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, lora_dropout=0.0)
    )
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert assert_exact(model, variant).keys() == names
    assert names
    assert all("lora" in name for name in names)


@pytest.mark.parametrize("frozen", [None, "document"])
def test_a_router_with_a_model_for_each_side(directory: Path, variant: dict[str, Any], frozen: str | None) -> None:
    router = Router.for_query_document(list(student(directory, 1)), list(student(directory, 2)))
    model = SentenceTransformer(modules=[router], device="cpu").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen is None or frozen not in name)
    columns = batch()
    inputs = [
        {**model.preprocess(column, task="query" if number == 0 else "document"), "raw_text": column}
        for number, column in enumerate(columns)
    ]
    found = assert_exact(model, variant, inputs=inputs, columns=columns)
    assert any(".query." in name for name in found)
    assert any(".document." in name for name in found) == (frozen is None)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_that_differ_by_column(
    model: SentenceTransformer, variant: dict[str, Any], include_prompt: bool
) -> None:
    model[1].include_prompt = include_prompt
    columns = batch()
    prompts = {"anchor": "Where is it said that: ", "positive": "document: "}
    collator = RerankerDataCollator(preprocess_fn=model.preprocess, prompts=prompts)
    names = ["anchor", "positive", "negative"]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    inputs = batch_of(collator(rows))
    plain = embeddings(model, features(model, columns))
    prompted = embeddings(model, inputs)
    assert [torch.allclose(*pair, atol=1e-3) for pair in zip(plain, prompted, strict=True)] == [False, False, True]
    # The reference has scores only for texts without prompts: with prompts the reranker would be asked for other texts.
    assert_exact(model, variant, inputs=inputs, columns=columns)


class MeanOfWords(nn.Module):
    """Embeds a text by the mean of its words' embeddings, so that there is little to compile."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, size)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"][..., None].float()
        embedded = (self.words(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        return {**features, "sentence_embedding": embedded}


_INDUCTOR = pytest.param(
    *("inductor", {}), marks=pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
)


@pytest.mark.parametrize(
    ("backend", "options"), [("eager", BOTH), ("aot_eager", {}), ("aot_eager", NUCLEUS), _INDUCTOR]
)
def test_compiled_models(model: SentenceTransformer, backend: str, options: dict[str, Any]) -> None:
    from torch._inductor import config

    # Without a pool of compiling processes, each of which would import torch.
    with config.patch(compile_threads=1):
        check_compiled(model, backend, options)


def check_compiled(model: SentenceTransformer, backend: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = SentenceTransformer(modules=[MeanOfWords(len(model.tokenizer), 32)], device="cpu")
    torch.compiler.reset()
    calls = []
    wrapped: Any = torch.compile(small, backend=backend, dynamic=True)
    wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    columns = batch()
    assert_exact(small, options, wrapped=wrapped, inputs=features(model, columns), columns=columns)
    assert len(calls) == 2 * 3 * 2, "two mini-batches of each of three columns, twice"
    torch.compiler.reset()


def test_gradient_checkpointing(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    columns = batch()
    inputs = features(model, columns)
    model.train()
    results = []
    for checkpoint in (False, True):
        if checkpoint:
            model[0].auto_model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = make(model, MemoryScorer(random_scores()), **variant)
        results.append(loss_and_gradients(loss, inputs))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


# Numbers


def test_weights_in_bfloat16(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    model.to(torch.bfloat16)
    columns = batch()
    inputs = features(model, columns)
    # The reference embeds the same mini-batches, because other padding rounds differently.
    loss = make(model, MemoryScorer(random_scores()), mini_batch_size=len(columns[0]), **variant)
    value = loss(inputs, None)
    value.backward()
    found = {name: gradient.float() for name, gradient in gradients(model).items()}
    expected = expected_of(model, inputs, columns, **variant)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} <= {torch.bfloat16}
    # bfloat16 has eight significant bits, and sums in another order differ in the last one.
    assert_same_gradients(found, {name: gradient.float() for name, gradient in expected[1].items()}, tolerance=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_both_ways_of_choosing_candidates_agree(model: SentenceTransformer, dtype: torch.dtype) -> None:
    inputs = features(model, batch())
    results = []
    for options in ({}, NUCLEUS):
        with torch.autocast("cpu", dtype=dtype):
            loss = make(model, MemoryScorer(random_scores()), **BOTH, **options)
            value = loss(inputs, None)
        value.backward()
        assert value.dtype == torch.float32
        results.append((float(value.detach()), gradients(model)))
        model.zero_grad()
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


def test_double_precision_is_kept(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    model.double()
    columns = batch()
    inputs = features(model, columns)
    expected = expected_of(model, inputs, columns, **variant)
    found = loss_and_gradients(make(model, MemoryScorer(random_scores()), **variant), inputs)
    assert found[0] == pytest.approx(expected[0], abs=1e-12)
    assert_same_gradients(found[1], expected[1], tolerance=1e-11)


def test_scaled_gradients_accumulate_over_micro_batches(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    halves = [batch(), [column[::-1] for column in texts(3, 5)]]
    inputs = [features(model, columns) for columns in halves]
    expected = [expected_of(model, each, columns, **variant)[1] for each, columns in zip(inputs, halves, strict=True)]
    loss = make(model, MemoryScorer(random_scores()), **variant)
    for each in inputs:
        (loss(each, None) / 2 * 1024).backward()
    assert_same_gradients(
        gradients(model), {name: 512 * (expected[0][name] + expected[1][name]) for name in expected[0]}
    )


def test_two_forwards_before_one_backward(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    parts = [batch(), [column[::-1] for column in texts(3, 5)]]
    inputs = [features(model, columns) for columns in parts]
    expected = [expected_of(model, each, columns, **variant)[1] for each, columns in zip(inputs, parts, strict=True)]
    loss = make(model, MemoryScorer(random_scores()), **variant)
    first, second = (loss(each, None) for each in inputs)
    (first - 0.5 * second).backward()
    assert_same_gradients(gradients(model), {name: expected[0][name] - 0.5 * expected[1][name] for name in expected[0]})


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_mini_batches_by_tokens(model: SentenceTransformer, variant: dict[str, Any], tokens: int) -> None:
    assert_exact(model, {**variant, "mini_batch_num_tokens": tokens})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation(model: SentenceTransformer, variant: dict[str, Any], context: Callable[[], Any]) -> None:
    columns = batch()
    inputs = features(model, columns)
    expected = expected_of(model, inputs, columns, **variant)[0]
    with context():
        value = make(model, MemoryScorer(random_scores()), **variant)(inputs, None)
    assert not value.requires_grad
    assert float(value) == pytest.approx(expected, abs=1e-5)


def test_choosing_candidates_equals_the_local_loss_when_its_guide_is_served(
    directory: Path, model: SentenceTransformer
) -> None:
    judge, columns = guide(directory), texts(4, 8)
    reference = CachedGISTEmbedLoss(model, judge, temperature=TEMPERATURE, mini_batch_size=3, margin=MARGIN)
    expected = loss_and_gradients(reference, features(model, columns, raw=False))
    loss = make(model, MemoryScorer(cosines_of(judge)), **NUCLEUS, **BOTH, contrast_filter="scores")
    found = loss_and_gradients(loss, features(model, columns))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert 0 < loss.statistics.masked_negatives < loss.statistics.negatives


# Memory


def test_every_score_is_released_when_the_loss_returns(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    scorer = MemoryScorer(random_scores())
    make(model, scorer, **variant)(features(model, batch()), None)
    assert scorer.jobs
    for job in scorer.jobs:
        assert sorted(row for begin, end in job.released for row in range(begin, end)) == list(range(job.shape[0]))


class Pace:
    """Lets a server answer for some rows only after earlier rows have been released."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._released = 0
        self._waiting: list[tuple[int, Gate]] = []

    def given_back(self, rows: int) -> None:
        with self._lock:
            self._released = max(self._released, rows)
            for needed, gate in self._waiting:
                if needed <= self._released:
                    gate.open()

    async def wait_for(self, rows: int) -> None:
        gate = Gate()
        with self._lock:
            self._waiting.append((rows, gate))
            if rows <= self._released:
                gate.open()
        await gate.wait()


class WatchedClient(RerankerClient):
    """Keeps its matrices, and the largest number of blocks that one held when rows were released."""

    def __init__(self, target: str, pace: Pace) -> None:
        super().__init__(target, timeout=WAIT_SECONDS)
        self.matrices: list[ScoreMatrix] = []
        self.most_blocks = 0
        self._pace = pace

    def stream_grid(self, *args: Any, **options: Any) -> ScoreMatrix:
        matrix = super().stream_grid(*args, **options)
        release = matrix.release

        def watched(begin: int, end: int) -> None:
            self.most_blocks = max(self.most_blocks, len(matrix._blocks))
            release(begin, end)
            self._pace.given_back(end)

        matrix.release = watched  # type: ignore[method-assign]
        self.matrices.append(matrix)
        return matrix

    def stream_pairs(self, *args: Any, **options: Any) -> ScoreMatrix:
        self.matrices.append(super().stream_pairs(*args, **options))
        return self.matrices[-1]


def test_a_large_grid_is_never_in_memory_as_a_whole(model: SentenceTransformer) -> None:
    rows, ahead = 400, 100
    columns = [[f"{name} {number}" for number in range(rows)] for name in ("a value", "the key")]
    pace = Pace()

    async def keep_pace(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await pace.wait_for(columns[0].index(chunk.queries[0]) - ahead)

    with StubServer(on_chunk=keep_pace) as server, WatchedClient(server.target, pace) as client:
        loss = make(model, client, mini_batch_size=50, chunk_pairs=4096)
        with torch.no_grad():
            loss(features(model, columns), None)
        (matrix,) = client.matrices
        assert matrix.shape == (rows, rows)
        assert -(-rows // matrix._height) == 3, "blocks of the whole matrix"
        assert client.most_blocks == 2
        assert not matrix._blocks


@pytest.mark.parametrize("options", [BOTH, {**BOTH, "contrast_filter": "scores"}, {**BOTH, **NUCLEUS}])
def test_a_client_holds_no_scores_when_the_loss_returns(model: SentenceTransformer, options: dict[str, Any]) -> None:
    with StubServer() as server, WatchedClient(server.target, Pace()) as client:
        make(model, client, **options)(features(model, batch()), None)
        assert client.matrices
        assert not any(matrix._blocks for matrix in client.matrices)


# Failures


@pytest.mark.parametrize("candidates", ["all", "nearest"])
@pytest.mark.parametrize(
    ("strategy", "margin", "message"),
    [
        ("absolute", 1.0, "masks every negative"),
        ("relative", 1.5, "masks every negative"),
        ("absolute", -1.0, "masks no negative"),
        ("absolute", float("nan"), "finite"),
    ],
)
def test_a_margin_that_cannot_work_is_refused_when_it_is_set_later(
    model: SentenceTransformer, candidates: str, strategy: str, margin: float, message: str
) -> None:
    scorer, inputs = MemoryScorer(random_scores()), features(model, texts(2, 4))
    loss = make(model, scorer, score_type="probability", margin_strategy=strategy, candidates=candidates, top_p=0.999)
    loss(inputs, None)
    asked = len(scorer.jobs)
    loss.margin = margin
    with pytest.raises(ValueError, match=message):
        loss(inputs, None)
    assert loss.statistics.steps == 1
    assert all(job.cancelled for job in scorer.jobs[asked:])


def test_a_schedule_that_sets_such_a_margin_ends_training(directory: Path, model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, score_type="probability")
    args = arguments(directory, max_steps=3)
    trainer = SentenceTransformerTrainer(
        model, args, dataset(2, 12), loss=loss, callbacks=[RerankerMarginCallback(loss, lambda progress: 3 * progress)],
        data_collator=RerankerDataCollator.for_training(model, args, loss),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"margin of 1\.0 .* masks every negative"):
        trainer.train()
    assert loss.statistics.steps == 1


@pytest.mark.parametrize("candidates", ["all", "nearest"])
def test_what_was_begun_for_a_bad_batch_is_cancelled(model: SentenceTransformer, candidates: str) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, candidates=candidates, top_p=0.999)
    collator = RerankerDataCollator.for_training(model, loss=loss)
    inputs = batch_of(collator([dict(row) for row in dataset(3, 4)]))
    inputs[2]["raw_text"] = inputs[2]["raw_text"][:3]
    with pytest.raises(ValueError, match=r"\[4, 4, 3\]"):
        loss(inputs, None)
    del inputs
    gc.collect()
    begun = len(scorer.jobs)
    assert [job.cancelled for job in scorer.jobs] == [True] * begun
    assert begun
    with pytest.raises(ValueError, match="at least two columns"):
        loss(batch_of(collator([{"anchor": "alone"}])), None)
    assert len(scorer.jobs) == begun


def test_static_embeddings_are_refused_behind_a_router_and_a_compiler(model: SentenceTransformer) -> None:
    static = StaticEmbedding(wordpiece_tokenizer(), embedding_dim=64)
    router = SentenceTransformer(modules=[Router.for_query_document([static], list(model))], device="cpu")
    for wrapped in (router, torch.compile(router, backend="eager")):
        with pytest.raises(ValueError, match="StaticEmbedding"):
            make(wrapped, MemoryScorer(random_scores()))


@pytest.mark.parametrize("candidates", ["all", "nearest"])
@pytest.mark.parametrize("on_error", ["raise", "unfiltered"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_server_with_another_contract_stops_the_first_step(
    model: SentenceTransformer, candidates: str, on_error: str, ahead: bool
) -> None:
    with StubServer(contract=(2, 0)) as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        loss = make(model, client, candidates=candidates, top_p=0.999, on_error=on_error)
        collator = RerankerDataCollator.for_training(model, loss=loss if ahead else None)
        with pytest.raises(IncompatibleServerError, match=r"speaks contract 2\.0; this client needs 1\.x"):
            loss(batch_of(collator([dict(row) for row in dataset(3, 4)])), None)
        assert not server.streams
        assert not server.requests


def test_a_server_without_streams_gives_the_same_loss_and_one_warning(
    model: SentenceTransformer, variant: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    columns = batch()
    inputs = features(model, columns)
    raw = pb.RerankOptions(score_type=pb.SCORE_TYPE_RAW)
    expected = expected_of(model, inputs, columns, lambda *pair: hash_scores(*pair, raw), **variant)
    for without in (set(), {"RerankStream"}):
        with StubServer(without=without) as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
            caplog.clear()
            loss = make(model, client, chunk_pairs=20, **variant)
            for _ in range(2):
                found = loss_and_gradients(loss, inputs)
                assert found[0] == pytest.approx(expected[0], abs=1e-5)
                assert_same_gradients(found[1], expected[1])
            warnings = [record for record in caplog.records if "RerankStream" in record.getMessage()]
            assert len(warnings) == len(without)
            assert bool(server.requests) == bool(without)
            assert bool(server.streams) == (not without)
