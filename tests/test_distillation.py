"""Soft targets: value and gradients of the loss equal those of loops over the definition."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch import Tensor, nn

from loss_client import Distillation, IncompatibleServerError, RerankerClient, RerankerUnavailableError
from loss_client.collator import RerankerDataCollator
from loss_client.filter.calibration import STEPS, Calibration, entropy_sums
from loss_client.filter.contrast import Hardness
from loss_client.filter.gather import Rows
from loss_client.filter.logits import CandidateLogits
from loss_client.filter.nearest import nearest
from loss_client.filter.scale import probabilities
from loss_client.filter.step_loss import StepLoss
from loss_client.loss import RerankerCachedGISTEmbedLoss
from reranker_service.scoring.scorer import Scorer

from .soft_targets import TEMPERATURE, Reference, options_of
from .stub_server import WAIT_SECONDS, StubServer
from .test_loss_surroundings import BOTH, NUCLEUS, VARIANTS, batch, embeddings, pairwise
from .test_prefetch import batch_of
from .training import (
    MemoryScorer,
    assert_same_gradients,
    features,
    gradients,
    loss_and_gradients,
    random_scores,
    student,
    texts,
)

FIXED: dict[str, Any] = {"weight": 0.7, "temperature": 0.3}
GUIDE = random_scores()


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return student(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(shared_model: SentenceTransformer) -> SentenceTransformer:
    """Return a new student, dropout off."""
    return copy.deepcopy(shared_model).eval()


def make(model: Any, distillation: Distillation | None, scorer: Any = None, **more: Any) -> RerankerCachedGISTEmbedLoss:
    return RerankerCachedGISTEmbedLoss(model, scorer or MemoryScorer(GUIDE), **options_of(distillation, **more))


def reference(model: SentenceTransformer, columns: list[list[str]], **more: Any) -> Reference:
    return Reference(embeddings(model, features(model, columns)), columns, GUIDE, **more)


def assert_equal(model: SentenceTransformer, loss: RerankerCachedGISTEmbedLoss, inputs: Any, expected: Tensor) -> None:
    """Assert that value and gradients of the loss equal those of the reference."""
    model.zero_grad()
    expected.backward()
    wanted = gradients(model)
    found = loss_and_gradients(loss, inputs)
    assert found[0] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    assert_same_gradients(found[1], wanted, tolerance=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition_with_repeated_texts(model: SentenceTransformer, variant: str) -> None:
    columns, inputs = batch(), features(model, batch())
    loss = make(model, Distillation(**FIXED), **VARIANTS[variant])
    contrast = pairwise(embeddings(model, inputs), columns, GUIDE, **VARIANTS[variant])
    term = reference(model, columns).distilled()
    assert_equal(model, loss, inputs, contrast + 0.7 * term)
    assert loss.statistics.distilled_anchors == 6
    assert loss.statistics.distillation_loss == pytest.approx(6 * float(term.detach()), rel=1e-4)
    jobs = loss._client.jobs  # type: ignore[union-attr]
    assert {job.options["score_type"] for job in jobs} == {"raw"}
    for job in jobs:
        assert sorted(row for begin, end in job.released for row in range(begin, end)) == list(range(job.shape[0]))


def test_a_row_with_two_copies_of_a_text_has_one_target(model: SentenceTransformer) -> None:
    columns = texts(4, 5)
    columns[2][0], columns[3][1], columns[3][2] = columns[1][0], columns[2][1], columns[2][3]
    reference_term = reference(model, columns).distilled()
    loss = make(model, Distillation(**FIXED))
    contrast = pairwise(embeddings(model, features(model, columns)), columns, GUIDE)
    assert_equal(model, loss, features(model, columns), contrast + 0.7 * reference_term)


def test_without_gradient_caching_and_without_gradients(model: SentenceTransformer) -> None:
    columns, inputs = batch(), features(model, batch())
    loss = make(model, Distillation(**FIXED))
    found = loss_and_gradients(loss, inputs)
    with torch.no_grad():
        assert float(loss(inputs, None)) == pytest.approx(found[0], abs=1e-6)
    model.zero_grad()
    step = loss.begin(columns)
    step.settle(loss._settings())
    loss.calculate_loss([[column] for column in embeddings(model, inputs)], step).backward()  # type: ignore[no-untyped-call]
    assert_same_gradients(gradients(model), found[1])


def test_matryoshka(model: SentenceTransformer) -> None:
    columns, inputs, scorer = batch(), features(model, batch()), MemoryScorer(GUIDE)
    loss = make(model, Distillation(**FIXED), scorer)
    expected = torch.zeros(())
    for dim, weight in ((32, 1.0), (8, 0.5)):
        cut = [column[:, :dim] for column in embeddings(model, inputs)]
        term = Reference(cut, columns, GUIDE).distilled()
        expected = expected + weight * (pairwise(cut, columns, GUIDE) + 0.7 * term)
    model.zero_grad()
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = gradients(model)
    outer = MatryoshkaLoss(model, loss, [32, 8], [1.0, 0.5])
    found = loss_and_gradients(outer, inputs)
    assert found[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(found[1], wanted)
    assert len(scorer.jobs) == 1
    assert loss.statistics.distilled_anchors == 6


def test_where_not_all_is_scored_the_distributions_are_over_what_is(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "DRAWN", 0)  # no random pairs for the estimate of missed masks
    columns, scorer = batch(), MemoryScorer(GUIDE)
    inputs = features(model, columns)
    loss = make(model, Distillation(**FIXED), scorer, candidates="nearest", top_p=1 - 0.4)
    found = loss_and_gradients(loss, inputs)
    known = {pair for job in scorer.jobs for pair in zip(job.queries, job.documents, strict=True)}
    assert loss.statistics.skipped_pairs > 5
    term = reference(model, columns, known=known)
    model.zero_grad()
    expected = term.contrasted() + 0.7 * term.distilled()
    expected.backward()  # type: ignore[no-untyped-call]
    assert found[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(found[1], gradients(model))


def test_bfloat16(model: SentenceTransformer) -> None:
    columns = batch()
    inputs = features(model, columns)
    loss = make(model, Distillation(**FIXED), mini_batch_size=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(inputs, None)
        embedded = [column.detach() for column in embeddings(model, inputs)]
    value.backward()
    expected = pairwise(embedded, columns, GUIDE) + 0.7 * Reference(embedded, columns, GUIDE).distilled()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-3)
    assert all(each.isfinite().all() for each in gradients(model).values())


# Equal anchors


@pytest.mark.parametrize("variant", [{}, NUCLEUS])
def test_the_positive_of_an_equal_anchor_is_no_negative(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    columns = texts(2, 3)
    columns[0][2] = columns[0][0]
    positives, other = [columns[1][0], columns[1][2]], columns[1][1]

    def score(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[0.9 if text == positives[0] else 0.1 for text in documents] for _ in queries], np.float32)

    scorer = MemoryScorer(score)
    loss = make(model, None, scorer, margin=-2.0, **variant)
    step = loss.begin(columns)
    step.settle(loss._settings())
    step.select(3, lambda begin, end: torch.zeros(end - begin, 3))
    assert step.mask(0, 3).tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert other in scorer.jobs[0].documents


# The other terms


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_equals_the_ranking_loss_where_nothing_is_masked(model: SentenceTransformer, mode: Any) -> None:
    columns = texts(4, 6)
    local = CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=3, hardness_mode=mode, hardness_strength=9.0
    )
    expected = loss_and_gradients(local, features(model, columns, raw=False))
    scorer = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    loss = make(model, None, scorer, margin=0.0, hardness_mode=mode, hardness_strength=9.0)
    found = loss_and_gradients(loss, features(model, columns))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"hardness": ("in_batch_negatives", 5.0)}, {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}),
        ({"hardness": ("all_negatives", 5.0)}, {"hardness_mode": "all_negatives", "hardness_strength": 5.0, **NUCLEUS}),
        ({"hardness": ("hard_negatives", 5.0)}, {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
    ],
)
def test_hardness_beside_distillation(
    model: SentenceTransformer, more: dict[str, Any], options: dict[str, Any]
) -> None:
    columns = batch()
    terms = reference(model, columns)
    contrast = terms.contrasted(**more)
    loss = make(model, Distillation(**FIXED), **options)
    assert_equal(model, loss, features(model, columns), contrast + 0.7 * terms.distilled())
    assert loss.statistics.distilled_anchors == 6


def test_contrast_terms_get_no_penalty() -> None:
    logits = CandidateLogits([], Rows((4,), 0), TEMPERATURE, True, True, Hardness("all_negatives", 2.0))
    penalties = logits.penalized(torch.ones(2, 16), 1, 3) - 1
    expected = [[1.0] * 4 + [0.0] * 8 + [1.0] * 4 for _ in range(2)]
    expected[0][1] = expected[1][2] = 0.0
    assert torch.allclose(penalties, 2.0 * TEMPERATURE * torch.tensor(expected))


# Without distillation


class OldStepLoss(StepLoss):
    """The loss of some rows as it was before there were soft targets."""

    def _rows_loss(self, logits: Any, step: Any, begin: int, end: int) -> Tensor:
        own = torch.arange(begin, end) + step.rows.offset
        mask = torch.from_numpy(step.mask(begin, end))
        return nn.functional.cross_entropy(logits.plain(begin, end).masked_fill(mask, -torch.inf), own, reduction="sum")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("distillation", [None, Distillation(weight=0.0)])
def test_without_distillation_the_bits_are_the_same(
    model: SentenceTransformer, variant: str, distillation: Distillation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = features(model, texts(3, 6))
    with monkeypatch.context() as patched:
        patched.setattr("loss_client.loss.StepLoss", OldStepLoss)
        expected = loss_and_gradients(make(model, None, **VARIANTS[variant]), inputs)
    found = loss_and_gradients(make(model, distillation, **VARIANTS[variant]), inputs)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


# Scale


@pytest.mark.parametrize("scale", ["logit", "cosine"])
def test_probabilities_have_the_bits_of_the_server(scale: Any) -> None:
    generator = np.random.default_rng(0)
    raw = generator.normal(0, 8, 50_000).astype(np.float32) if scale == "logit" else None
    raw = generator.uniform(-1, 1, 50_001).astype(np.float32) if raw is None else raw
    served = Scorer._probability(SimpleNamespace(_cosines=scale == "cosine"), raw)  # type: ignore[arg-type]
    assert probabilities(raw, scale).tobytes() == served.tobytes()


class ServedScorer(MemoryScorer):
    """Scores as a server with this scale does: raw, or as probabilities."""

    def stream_grid(self, queries: Sequence[str], documents: Sequence[str], **options: Any) -> Any:
        job = super().stream_grid(queries, documents, **options)
        if options["score_type"] == "probability":
            server = SimpleNamespace(_cosines=self._scale == "cosine")
            job.values = Scorer._probability(server, job.values)  # type: ignore[arg-type]
        return job


@pytest.mark.parametrize("scale", ["logit", "cosine"])
def test_masks_are_those_of_the_servers_probabilities(model: SentenceTransformer, scale: Any) -> None:
    columns = texts(3, 24)

    def wide(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return GUIDE(queries, documents) * np.float32(20 if scale == "logit" else 1)

    masks = []
    for distillation in (None, Distillation()):
        scorer = ServedScorer(wide, scale=scale)
        loss = make(model, distillation, scorer, score_type="probability", **BOTH)
        step = loss.begin(columns)
        step.settle(loss._settings())
        masks.append(step.mask(0, 24))
        assert scorer.jobs[0].options["score_type"] == ("raw" if distillation else "probability")
    assert 0 < masks[0].sum() < masks[0].size
    assert np.array_equal(masks[0], masks[1])


def test_the_client_names_the_scale_of_raw_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubServer() as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        assert client.raw_scale() == "logit"
        monkeypatch.setattr(client, "_model_info", lambda *_: SimpleNamespace(kind=3))
        assert client.raw_scale() == "cosine"
        monkeypatch.setattr(client, "_model_info", lambda *_: SimpleNamespace(kind=9))
        with pytest.raises(IncompatibleServerError, match="kind 9"):
            client.raw_scale()


# Temperature


def bisected(entropy: Callable[[float], float], wanted: float) -> float:
    low, high = 1e-4, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle) < wanted else (low, middle)
    return low


@pytest.mark.parametrize("variant", [{}, NUCLEUS])
def test_the_temperature_gives_the_entropy_asked_for(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    model.train()
    parts = [texts(4, 8), [column[::-1] for column in texts(4, 5)]]
    loss = make(model, Distillation(entropy=0.4), **variant)
    assert loss.distill_temperature is None
    references = []
    for columns in parts:
        references.append(Reference([torch.ones(len(columns[0]), 1)] * 4, columns, GUIDE))
        loss(features(model, columns), None)
        weights = [len(each.rows) for each in references]
        expected = bisected(
            lambda t, each=tuple(references), w=tuple(weights): (
                sum(one.entropy(t) * n for one, n in zip(each, w, strict=True)) / sum(w)
            ),
            0.4,
        )
        assert loss.distill_temperature == pytest.approx(expected, rel=0.02)


def test_the_temperature_is_frozen_logged_saved_and_left_alone_by_evaluation(
    model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Distillation()
    loss = make(model, settings)
    narrow, wide = features(model, texts(2, 3)), features(model, texts(2, 5))
    loss(narrow, None)  # the model is in evaluation mode
    model.train()
    with torch.no_grad():
        loss(narrow, None)
    assert loss.distill_temperature is None
    with caplog.at_level(logging.INFO, "loss_client.filter.distiller"):
        for step in range(STEPS + 2):
            loss(narrow if step < STEPS else wide, None)
            if step == STEPS - 1:
                frozen = loss.distill_temperature
            if step in (3, STEPS):
                model.eval()
                loss(wide, None)
                model.train()
    assert loss.distill_temperature == frozen
    assert [f"{frozen:.4g}" in record.getMessage() for record in caplog.records] == [True]
    state = json.loads(json.dumps(loss.resume_state()))
    other = make(model, settings, mini_batch_size=1)
    other.load_resume_state(state)
    assert other.distill_temperature == frozen
    assert other(wide, None) is not None
    assert other.distill_temperature == frozen
    with pytest.raises(ValueError, match="another version"):
        other.load_resume_state({"steps": 3})


def test_the_temperature_does_not_depend_on_mini_batches_and_adds_up_over_ranks(model: SentenceTransformer) -> None:
    model.train()
    found = []
    for size in (1, 3, 8):
        loss = make(model, Distillation(), mini_batch_size=size)
        loss(features(model, texts(3, 8)), None)
        found.append(loss.distill_temperature)
    assert len(set(found)) == 1
    scores = GUIDE([str(row) for row in range(8)], [str(row) for row in range(30)])
    together, apart = Calibration(), Calibration()
    together.add(entropy_sums(scores))
    apart.add(entropy_sums(scores[:3]) + entropy_sums(scores[3:]))
    assert together.temperature(0.3) == pytest.approx(apart.temperature(0.3))


def test_rows_without_two_scores_and_equal_scores_need_no_temperature(model: SentenceTransformer) -> None:
    model.train()
    loss = make(model, Distillation())
    single = [column[:1] for column in texts(2, 1)]
    assert float(loss(features(model, single), None).detach()) == 0
    assert loss.distill_temperature is None
    equal = MemoryScorer(lambda queries, documents: np.zeros((len(queries), len(documents)), np.float32))
    value = make(model, Distillation(), equal)(features(model, texts(2, 4)), None)
    assert value.isfinite()


def test_one_warning_where_probabilities_underflow(
    model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = features(model, texts(2, 6))
    make(model, Distillation(temperature=0.1))(inputs, None)
    assert not caplog.records
    loss = make(model, Distillation(temperature=0.001))
    for _ in range(2):
        value = loss(inputs, None)
        assert value.isfinite()
    assert ["underflows" in record.getMessage() for record in caplog.records] == [True]


# Arguments and surroundings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be"),
        ({"temperature": 0.0}, "temperature must be 'auto' or"),
        ({"temperature": "warm"}, "temperature must be 'auto' or"),
        ({"entropy": 1.0}, "entropy must be"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardness_mode": "hard"}, "hardness_mode must be None or"),
        ({"hardness_strength": -1.0}, "hardness_strength must be"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    model: SentenceTransformer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model, None, **options)


def test_a_batch_that_was_begun_for_probabilities_is_asked_for_anew(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(GUIDE)
    loss = make(model, None, scorer, score_type="probability", margin=0.05)
    collator = RerankerDataCollator.for_training(model, loss=loss)
    columns = batch()
    rows = [dict(zip(("anchor", "positive", "negative"), row, strict=True)) for row in zip(*columns, strict=True)]
    ahead = batch_of(collator(rows))
    loss.distillation = Distillation(**FIXED)
    loss(ahead, None)
    assert [job.options["score_type"] for job in scorer.jobs] == ["probability", "raw"]
    assert [job.cancelled for job in scorer.jobs] == [True, False]
    loss.score_type, loss.margin = "raw", 0.1
    ahead = batch_of(collator(rows))
    loss.distillation = Distillation(weight=0.5, temperature=0.3)  # of the same scores
    found = float(loss(ahead, None).detach())
    assert len(scorer.jobs) == 3
    terms = reference(model, columns)
    expected = terms.contrasted() + 0.5 * terms.distilled()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("variant", [{}, NUCLEUS])
def test_without_scores_a_step_trains_without_both(model: SentenceTransformer, variant: dict[str, Any]) -> None:
    inputs, options = features(model, batch()), {**variant, "on_error": "unfiltered"}
    model.train()
    torch.manual_seed(0)
    expected = loss_and_gradients(
        make(model, None, MemoryScorer(GUIDE, RerankerUnavailableError("gone")), **options), inputs
    )
    torch.manual_seed(0)
    loss = make(model, Distillation(), MemoryScorer(GUIDE, RerankerUnavailableError("gone")), **options)
    found = loss_and_gradients(loss, inputs)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert_same_gradients(found[1], expected[1])
    assert (loss.statistics.unfiltered_steps, loss.statistics.distilled_anchors) == (1, 0)


def test_a_reranker_without_a_known_scale_counts_as_missing_scores(model: SentenceTransformer) -> None:
    class Unknown(MemoryScorer):
        def raw_scale(self, timeout: float | None) -> Any:
            raise RerankerUnavailableError("gone")

    loss = make(model, Distillation(), Unknown(GUIDE), score_type="probability", on_error="unfiltered")
    assert loss(features(model, batch()), None).isfinite()
    assert loss.statistics.unfiltered_steps == 1


def test_the_model_card_gets_the_settings(model: SentenceTransformer) -> None:
    config = make(model, Distillation(weight=2.0), hardness_mode="hard_negatives").get_config_dict()
    assert config["distillation"]["weight"] == 2.0
    assert json.loads(json.dumps(config)) == config
    assert make(model, None).get_config_dict()["distillation"] is None
