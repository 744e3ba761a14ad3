"""RerankerCachedGISTEmbedLoss and its callers: order of work, texts, arguments, failures, copies, model card."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerUnavailableError, ScoreError
from loss_client.filter.texts import TextReader
from loss_client.loss import RerankerCachedGISTEmbedLoss
from reranker.v1 import reranker_pb2 as pb

from .losses import make
from .models import wordpiece_tokenizer
from .stub_server import StubServer
from .training import (
    MemoryScorer,
    features,
    random_scores,
    texts,
)


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
        reranker_max_length=99,
        score_type="probability",
        chunk_pairs=7,
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
    with caplog.at_level(logging.WARNING, "loss_client.filter.texts"):
        loss(batch, None)
        loss(batch, None)
    assert scorer.jobs[0].queries == ["query : a mapping object", "query : logging levels"]
    assert scorer.jobs[0].documents == positives
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    for loss_of in ("letter case", "accents", "maximum length", "prompts", "'query : a mapping object'", "Collator"):
        assert loss_of in message


def test_flattened_inputs_are_decoded_by_their_boundaries(model: SentenceTransformer) -> None:
    columns = [["a value", "the keys of a mapping"], ["an item", "logging"]]
    flat = []
    for column in columns:
        ids = [model.tokenizer(text)["input_ids"] for text in column]
        bounds = torch.tensor([0, *np.cumsum([len(one) for one in ids])])
        flat.append({"input_ids": torch.tensor([[token for one in ids for token in one]]), "cu_seq_lens_q": bounds})
    assert TextReader().take(flat, model) == columns


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
        ({"chunk_pairs": -1}, "chunk_pairs must be greater than 0"),
        ({"timeout": 0.0}, "timeout must be greater than 0"),
        ({"margin": 1.0, "score_type": "probability"}, "masks every negative"),
    ],
)
def test_bad_arguments_are_refused(model: SentenceTransformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model, MemoryScorer(random_scores()), **options)


def test_former_names_of_arguments_are_accepted_with_a_warning(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    with pytest.warns(DeprecationWarning, match="is now named") as warned:
        loss = RerankerCachedGISTEmbedLoss(model, reranker_url=scorer, reranker_batch_size=9)
    assert {str(one.message) for one in warned} == {
        "reranker_url is now named reranker.", "reranker_batch_size is now named chunk_pairs."
    }  # fmt: skip
    assert all(one.filename == __file__ for one in warned)
    assert (loss._client, loss.chunk_pairs) == (scorer, 9)
    with pytest.raises(TypeError, match="chunk_pairs is given twice, also under its former name reranker_batch_size"):
        make(model, scorer, chunk_pairs=1, reranker_batch_size=2)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_present_names_of_arguments_give_no_warning(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    loss = RerankerCachedGISTEmbedLoss(model, reranker=scorer, chunk_pairs=9)
    assert (loss._client, loss.chunk_pairs) == (scorer, 9)


@pytest.mark.parametrize(("reranker", "error"), [([50051], TypeError), ([], ValueError), ("no port", ValueError)])
def test_a_reranker_that_is_no_address_is_refused(model: SentenceTransformer, reranker: Any, error: Any) -> None:
    with pytest.raises(error, match="address"):
        make(model, reranker)


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


def test_copies_and_pickles_have_a_client_of_their_own(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loss_client.arguments.MODEL_INFO_SECONDS", 0.05)
    loss = make(model, ["localhost:1", "localhost:2"], margin=0.25)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.margin == 0.25
        assert twin.get_config_dict() == loss.get_config_dict()
        assert twin._client is not loss._client


class NamedScorer(MemoryScorer):
    """Also answers ``model_info``, or raises ``failure``."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__(random_scores())
        self.asked: list[float] = []
        self._failure = failure

    def model_info(self, timeout: float) -> pb.GetModelInfoResponse:
        self.asked.append(timeout)
        if self._failure is not None:
            raise self._failure
        return pb.GetModelInfoResponse(model="bge-reranker", fingerprint="f1", engine="vllm")


def test_the_model_card_names_the_rerankers_model_and_asks_for_it_once(model: SentenceTransformer) -> None:
    scorer = NamedScorer()
    loss = make(model, scorer, margin=0.2)
    assert scorer.asked == []
    configs = [loss.get_config_dict() for _ in range(2)]
    assert configs[0] == configs[1]
    assert configs[0]["reranker"] == {"model": "bge-reranker", "fingerprint": "f1"}
    assert configs[0]["margin"] == 0.2
    assert len(scorer.asked) == 1
    assert 0 < scorer.asked[0] <= 10


@pytest.mark.parametrize("failure", [RerankerUnavailableError("gone"), RuntimeError("of another client")])
def test_a_reranker_that_does_not_answer_is_left_out_of_the_card(
    model: SentenceTransformer, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = NamedScorer(failure)
    loss = make(model, scorer)
    assert not any("reranker" in loss.get_config_dict() for _ in range(2))
    assert len(scorer.asked) == 1
    assert [str(failure) in record.getMessage() for record in caplog.records] == [True]


def test_a_client_without_model_info_is_left_out_of_the_card(model: SentenceTransformer) -> None:
    assert "reranker" not in make(model, MemoryScorer(random_scores())).get_config_dict()


def test_the_card_holds_what_the_server_says_and_no_address(model: SentenceTransformer) -> None:
    with StubServer() as server:
        loss = make(model, f"dns:///{server.target}")
        config = loss.get_config_dict()
        with RerankerClient(server.target) as client:
            info = client.model_info()
    assert config["reranker"] == {"model": info.model, "fingerprint": info.fingerprint}
    assert server.target not in repr(config)


def test_no_secret_of_an_address_reaches_the_card(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loss_client.arguments.MODEL_INFO_SECONDS", 0.05)
    config = make(model, "dns://user:secret@127.0.0.1:1/rerank.example:443?token=secret").get_config_dict()
    assert "secret" not in repr(config)
    assert "rerank.example" not in repr(config)


def test_a_trained_models_card_has_the_settings_and_the_citation(tmp_path: Path, model: SentenceTransformer) -> None:
    loss = make(
        model,
        NamedScorer(),
        margin=0.2,
        margin_strategy="relative",
        candidates="nearest",
        top_p=0.999,
        instruction="Find the answer",
    )
    args = SentenceTransformerTrainingArguments(str(tmp_path / "run"), report_to="none")
    data = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    _, _, after = card.partition("RerankerCachedGISTEmbedLoss</code> with these parameters:")
    shown = json.loads(after.partition("```json")[2].partition("```")[0])
    assert shown == loss.get_config_dict()
    assert (shown["reranker"]["model"], shown["margin"]) == ("bge-reranker", 0.2)
    assert loss.citation.strip() in card


def test_the_citation_names_both_papers(model: SentenceTransformer) -> None:
    citation = make(model, "localhost:1").citation
    assert "2402.16829" in citation
    assert "2101.06983" in citation
