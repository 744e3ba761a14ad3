"""The loss: equal to its references, exact in its masks, and clear about what cannot work."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn

from loss_client.errors import ScoreError
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .models import wordpiece_tokenizer
from .training import (
    MemoryScorer,
    assert_same_gradients,
    cosines_of,
    features,
    gradients,
    guide,
    loss_and_gradients,
    random_scores,
    student,
    texts,
)

MARGINS = [("absolute", 0.0), ("absolute", 0.3), ("absolute", -0.2), ("relative", 0.3), ("relative", -0.1)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def judge(directory: Path) -> SentenceTransformer:
    return guide(directory)


@pytest.fixture(scope="module")
def shared_model(directory: Path) -> SentenceTransformer:
    return student(directory)


@pytest.fixture
def model(shared_model: SentenceTransformer) -> Iterator[SentenceTransformer]:
    """The student, dropout off."""
    shared_model.eval()
    yield shared_model
    shared_model.zero_grad()


def make(model: Any, scorer: Any, **options: Any) -> RerankerCachedGISTEmbedLoss:
    return RerankerCachedGISTEmbedLoss(model, scorer, **{"temperature": 0.05, "score_type": "raw", **options})


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("mini_batch_size", [3, 32])
@pytest.mark.parametrize(("strategy", "margin"), MARGINS)
def test_equals_the_local_loss_when_its_guide_is_served(
    model: SentenceTransformer,
    judge: SentenceTransformer,
    columns: int,
    mini_batch_size: int,
    strategy: Any,
    margin: float,
) -> None:
    batch = texts(columns, 8)
    options: dict[str, Any] = {"mini_batch_size": mini_batch_size, "margin_strategy": strategy, "margin": margin}
    reference = CachedGISTEmbedLoss(
        model, judge, temperature=0.05, contrast_anchors=False, contrast_positives=False, **options
    )
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    scorer = MemoryScorer(cosines_of(judge))
    loss = make(model, scorer, **options)
    found = loss_and_gradients(loss, features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    # The comparison means nothing unless the filter had something to do, on both sides of zero.
    assert 0 < loss.statistics.masked_negatives < loss.statistics.negatives
    positives = scorer.jobs[0].values.diagonal()
    assert positives.min() < 0 < positives.max()


@pytest.mark.parametrize("columns", [2, 4])
def test_equals_the_local_loss_with_both_contrast_terms_scored(
    model: SentenceTransformer, judge: SentenceTransformer, columns: int
) -> None:
    batch = texts(columns, 8)
    reference = CachedGISTEmbedLoss(model, judge, temperature=0.05, mini_batch_size=3, margin=0.1)
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    options: dict[str, Any] = {"contrast_anchors": True, "contrast_positives": True, "contrast_filter": "scores"}
    loss = make(model, MemoryScorer(cosines_of(judge)), mini_batch_size=3, margin=0.1, **options)
    found = loss_and_gradients(loss, features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


def test_equals_the_unfiltered_loss_where_nothing_is_above_the_threshold(model: SentenceTransformer) -> None:
    batch = texts(3, 6)
    expected = loss_and_gradients(
        CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4), features(model, batch, raw=False)
    )
    scorer = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    found = loss_and_gradients(make(model, scorer, mini_batch_size=4), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


def loops(
    model: SentenceTransformer, columns: list[list[str]], mask: np.ndarray, contrast: tuple[bool, bool]
) -> Tensor:
    """The loss pair by pair, differentiable in the ordinary way; ``mask`` as ``ScoringStep.mask`` gives it."""
    embedded = [model(model.preprocess(column))["sentence_embedding"] for column in columns]
    anchors, positives, *negatives = embedded
    losses = []
    for row, anchor in enumerate(anchors):
        candidates = [(anchor, other) for other in positives]
        candidates += [(anchor, other) for other in anchors] if contrast[0] else []
        candidates += [(positives[row], other) for other in positives] if contrast[1] else []
        candidates += [(anchor, other) for column in negatives for other in column]
        logits = [nn.functional.cosine_similarity(left, right, dim=0) / 0.05 for left, right in candidates]
        kept = [logit for logit, masked in zip(logits, mask[row], strict=True) if not masked]
        losses.append(torch.logsumexp(torch.stack(kept), 0) - logits[row])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("contrast", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("by", ["known", "scores"])
def test_equals_the_sum_over_pairs_with_repeated_texts(
    model: SentenceTransformer, contrast: tuple[bool, bool], by: Any
) -> None:
    anchors, positives, negatives = texts(3, 6)
    columns = [[*anchors[:5], anchors[0]], [*positives[:4], positives[1], positives[5]], [positives[2], *negatives[1:]]]
    scorer = MemoryScorer(random_scores())
    loss = make(
        model,
        scorer,
        mini_batch_size=4,
        contrast_anchors=contrast[0],
        contrast_positives=contrast[1],
        contrast_filter=by,
    )
    found = loss_and_gradients(loss, features(model, columns))
    mask = loss._begin(columns).mask(0, 6)
    loss.zero_grad()
    expected = loops(model, columns, mask, contrast)
    expected.backward()
    assert found[0] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(found[1], gradients(model))


def test_four_copies_of_one_pair_are_no_negatives_of_each_other(model: SentenceTransformer) -> None:
    batch = [[column[0]] * 4 for column in texts(2, 1)]
    scorer = MemoryScorer(random_scores())
    contrast = {"contrast_anchors": True, "contrast_positives": True}
    assert loss_and_gradients(make(model, scorer, **contrast), features(model, batch))[0] == 0
    assert scorer.jobs[0].shape == (1, 1)


@pytest.mark.parametrize("columns", [2, 3])
def test_a_batch_of_one(model: SentenceTransformer, judge: SentenceTransformer, columns: int) -> None:
    batch = texts(columns, 1)
    reference = CachedGISTEmbedLoss(model, judge, temperature=0.05, contrast_anchors=False, contrast_positives=False)
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    found = loss_and_gradients(make(model, MemoryScorer(cosines_of(judge))), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert_same_gradients(found[1], expected[1])


def test_mini_batches_by_tokens_change_nothing(model: SentenceTransformer) -> None:
    batch = texts(3, 8)
    scorer = MemoryScorer(random_scores())
    expected = loss_and_gradients(make(model, scorer), features(model, batch))
    found = loss_and_gradients(make(model, scorer, mini_batch_num_tokens=50), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


def test_dropout_is_replayed(model: SentenceTransformer) -> None:
    model.train()
    batch = texts(2, 6)
    loss = make(model, MemoryScorer(random_scores()))
    torch.manual_seed(3)
    found = loss_and_gradients(loss, features(model, batch))
    mask = loss._begin(batch).mask(0, 6)
    loss.zero_grad()
    torch.manual_seed(3)
    expected = loops(model, batch, mask, (False, False))
    expected.backward()
    assert found[0] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_same_gradients(found[1], gradients(model))
    torch.manual_seed(4)
    assert loss_and_gradients(loss, features(model, batch))[0] != pytest.approx(found[0], abs=1e-3)


def test_two_forwards_before_one_backward(model: SentenceTransformer) -> None:
    first, second = features(model, texts(2, 4)), features(model, [column[::-1] for column in texts(2, 8)])
    loss = make(model, MemoryScorer(random_scores()), mini_batch_size=3)
    one, two = loss_and_gradients(loss, first)[1], loss_and_gradients(loss, second)[1]
    loss.zero_grad()
    values = [loss(first, None), loss(second, None)]
    (values[0] + 0.5 * values[1]).backward()
    assert_same_gradients(gradients(model), {name: one[name] + 0.5 * two[name] for name in one})


def test_gradients_carry_the_scale_of_the_outer_backward(model: SentenceTransformer) -> None:
    batch = features(model, texts(2, 4))
    loss = make(model, MemoryScorer(random_scores()))
    plain = loss_and_gradients(loss, batch)[1]
    loss.zero_grad()
    (loss(batch, None) * 128).backward()
    assert_same_gradients(gradients(model), {name: 128 * value for name, value in plain.items()})


def test_evaluation_gives_the_same_value_and_no_gradient(model: SentenceTransformer) -> None:
    batch = features(model, texts(3, 6))
    loss = make(model, MemoryScorer(random_scores()), mini_batch_size=4)
    expected = float(loss(batch, None))
    with torch.no_grad():
        found = loss(batch, None)
    assert not found.requires_grad
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_matryoshka_equals_matryoshka_over_the_local_loss(
    model: SentenceTransformer, judge: SentenceTransformer
) -> None:
    batch, dims, weights = texts(3, 6), [32, 16, 8], [1.0, 0.5, 0.25]
    reference = CachedGISTEmbedLoss(
        model, judge, temperature=0.05, mini_batch_size=4, contrast_anchors=False, contrast_positives=False
    )
    expected = loss_and_gradients(MatryoshkaLoss(model, reference, dims, weights), features(model, batch, raw=False))
    scorer = MemoryScorer(cosines_of(judge))
    inner = make(model, scorer, mini_batch_size=4)
    found = loss_and_gradients(MatryoshkaLoss(model, inner, dims, weights), features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert len(scorer.jobs) == 1
    assert inner.statistics.negatives == 6 * 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_cosines_keep_their_digits(model: SentenceTransformer, dtype: torch.dtype) -> None:
    batch, scorer = texts(3, 6), MemoryScorer(random_scores())
    loss = make(model, scorer, mini_batch_size=4, temperature=0.01)
    with torch.autocast("cpu", dtype=dtype):
        embedded = [model(model.preprocess(column))["sentence_embedding"].detach() for column in batch]
        found, grads = loss_and_gradients(loss, features(model, batch))
    mask = torch.from_numpy(loss._begin(batch).mask(0, 6))
    documents = torch.cat(embedded[1:]).double()
    logits = nn.functional.cosine_similarity(embedded[0].double()[:, None], documents[None], dim=-1) / 0.01
    expected = nn.functional.cross_entropy(logits.masked_fill(mask, -torch.inf), torch.arange(6))
    assert found == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-3)
    assert all(value.isfinite().all() for value in grads.values())


def test_a_step_is_asked_for_before_the_model_embeds(model: SentenceTransformer) -> None:
    events: list[str] = []

    class Recorder(MemoryScorer):
        def stream_grid(self, *args: Any, **options: Any) -> Any:
            events.append("ask")
            return super().stream_grid(*args, **options)

    handle = model.register_forward_pre_hook(lambda *_: events.append("embed"))
    loss = make(model, Recorder(random_scores()), mini_batch_size=2)
    loss(features(model, texts(2, 4)), None)
    handle.remove()
    assert events == ["ask", *["embed"] * 4]


def test_rows_are_read_mini_batch_by_mini_batch(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    make(model, scorer, mini_batch_size=3)(features(model, texts(2, 8)), None)
    assert scorer.jobs[0].reads == [(0, 3), (3, 6), (6, 8)]


def test_the_reranker_gets_the_raw_texts_and_the_options(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    batch = [["NASA in São Paulo", "C++ isn't C"], ["It's  HERE!", "Größe"]]
    loss = make(
        model,
        scorer,
        instruction="Find it",
        max_length=99,
        score_type="probability",
        reranker_batch_size=7,
        timeout=5.0,
    )
    loss(features(model, batch), None)
    job = scorer.jobs[0]
    assert [job.queries, job.documents] == batch
    assert job.options == {
        "instruction": "Find it", "max_length": 99, "score_type": "probability", "chunk_pairs": 7, "timeout": 5.0
    }  # fmt: skip


def test_the_batch_stays_as_it_was(model: SentenceTransformer) -> None:
    batch = features(model, texts(2, 4))
    keys = [sorted(column) for column in batch]
    make(model, MemoryScorer(random_scores()))(batch, None)
    assert [sorted(column) for column in batch] == keys


def test_without_raw_texts_token_ids_are_decoded_and_one_warning_says_so(
    model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer)
    anchors, positives = ["A Mapping object", "logging levels"], ["returns the value", "handlers and filters"]
    batch = [model.preprocess(anchors, prompt="query: "), model.preprocess(positives)]
    with caplog.at_level(logging.WARNING, "loss_client.loss"):
        loss(batch, None)
        loss(batch, None)
    assert scorer.jobs[0].queries == ["query : a mapping object", "query : logging levels"]
    assert scorer.jobs[0].documents == positives
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    for loss_of in ("letter case", "accents", "maximum length", "prompts", "'query : a mapping object'", "Collator"):
        assert loss_of in message


def test_flattened_inputs_are_decoded_by_their_boundaries(model: SentenceTransformer) -> None:
    loss = make(model, MemoryScorer(random_scores()))
    columns = [["a value", "the keys of a mapping"], ["an item", "logging"]]
    flat = []
    for column in columns:
        ids = [model.tokenizer(text)["input_ids"] for text in column]
        bounds = torch.tensor([0, *np.cumsum([len(one) for one in ids])])
        flat.append({"input_ids": torch.tensor([[token for one in ids for token in one]]), "cu_seq_lens_q": bounds})
    assert loss._take_texts(flat) == columns


def test_bad_batches_are_refused_before_anything_is_asked(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer)
    batch = features(model, texts(2, 4))
    with pytest.raises(ValueError, match="at least two columns"):
        loss(batch[:1], None)
    batch[1]["raw_text"] = batch[1]["raw_text"][:3]
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        loss(batch, None)
    with pytest.raises(ValueError, match="RerankerDataCollator"):
        loss([{"pixel_values": torch.zeros(2, 3)}, {"pixel_values": torch.zeros(2, 3)}], None)
    assert not scorer.jobs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin_strategy": "percent"}, "margin_strategy must be 'absolute' or 'relative'"),
        ({"score_type": "logit"}, "score_type must be 'probability' or 'raw'"),
        ({"contrast_filter": "none"}, "contrast_filter must be 'known' or 'scores'"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"mini_batch_size": 0}, "mini_batch_size must be greater than 0"),
        ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens must be greater than 0"),
        ({"reranker_batch_size": -1}, "reranker_batch_size must be greater than 0"),
        ({"timeout": 0.0}, "timeout must be greater than 0"),
        ({"margin": 1.0, "score_type": "probability"}, "masks every negative"),
    ],
)
def test_bad_arguments_are_refused(model: SentenceTransformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model, MemoryScorer(random_scores()), **options)


def test_a_reranker_that_is_no_address_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(TypeError, match="not int"):
        make(model, 50051)
    with pytest.raises(ValueError, match="at least one address"):
        make(model, [])


def test_static_embeddings_are_refused() -> None:
    static = SentenceTransformer(modules=[StaticEmbedding(wordpiece_tokenizer(), embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match="StaticEmbedding"):
        make(static, MemoryScorer(random_scores()))


@pytest.mark.parametrize("stage", ["embedding", "scores", "not finite"])
def test_the_job_is_cancelled_when_the_step_fails(model: SentenceTransformer, stage: str) -> None:
    score, error, handle = random_scores(), None, None
    expected: type[Exception] = RuntimeError
    if stage == "embedding":

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        handle = model.register_forward_pre_hook(fail)
    elif stage == "scores":
        error = RuntimeError("the reranker is gone")
    else:
        expected = ScoreError

        def score(queries: Any, documents: Any) -> Any:
            return np.full((len(queries), len(documents)), np.nan, np.float32)

    scorer = MemoryScorer(score, error)
    loss = make(model, scorer)
    try:
        with pytest.raises(expected):
            loss(features(model, texts(2, 4)), None)
    finally:
        if handle is not None:
            handle.remove()
    assert scorer.jobs[0].cancelled
    assert loss.statistics.steps == 0


def test_a_step_that_succeeds_is_not_cancelled(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    make(model, scorer)(features(model, texts(2, 4)), None)
    assert not scorer.jobs[0].cancelled


def test_only_the_model_has_parameters(model: SentenceTransformer) -> None:
    loss = make(model, "localhost:1")
    assert [name for name, _ in loss.named_children()] == ["model"]
    assert len(list(loss.parameters())) == len(list(model.parameters()))


def test_copies_and_pickles_open_their_own_client(model: SentenceTransformer) -> None:
    loss = make(model, ["localhost:1", "localhost:2"], margin=0.25)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.margin == 0.25
        assert twin.get_config_dict() == loss.get_config_dict()
        assert twin._reranker is not loss._reranker


def test_copies_share_the_callers_client(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    copy.deepcopy(make(model, scorer))(features(model, texts(2, 4)), None)
    assert len(scorer.jobs) == 1


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("grpcs://user:secret@rerank.example:443", "grpcs://rerank.example:443"),
        ("user:secret@rerank.example:443", "rerank.example:443"),
        ("dns:///rerank.example:443?token=secret", "dns:///rerank.example:443"),
        (["localhost:1", "grpc://secret@b:2"], ["localhost:1", "grpc://b:2"]),
    ],
)
def test_the_model_card_gets_the_settings_without_secrets(model: SentenceTransformer, target: Any, shown: Any) -> None:
    config = make(model, target, margin=0.2).get_config_dict()
    assert config["reranker_url"] == shown
    assert config["margin"] == 0.2
    assert "secret" not in repr(config)


def test_the_citation_names_both_papers(model: SentenceTransformer) -> None:
    citation = make(model, "localhost:1").citation
    assert "2402.16829" in citation
    assert "2101.06983" in citation
