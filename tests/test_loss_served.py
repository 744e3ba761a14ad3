"""The loss with a reranker server over a socket."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerState

from loss_client import (
    Distillation,
    RerankerCachedGISTEmbedLoss,
    RerankerClient,
    RerankerDataCollator,
    RerankerUnavailableError,
)

from .holding import LONG_TOKENS
from .scrapes import scrape
from .servers import ServerProcess
from .test_collator import arguments
from .training import (
    MemoryScorer,
    assert_same_gradients,
    cosines_of,
    dataset,
    features,
    loss_and_gradients,
    student,
    texts,
)

WAIT_SECONDS = 60.0


def in_order(data: Dataset, **options: Any) -> DefaultBatchSampler:
    """Return the dataset's rows in batches, in their order."""
    return DefaultBatchSampler(SequentialSampler(data), **options)


class UntilBegun(TrainerCallback):
    """Delays the end of the last step until the server has begun to score a later batch."""

    def __init__(self, server: ServerProcess, steps: int) -> None:
        self._server, self._steps = server, steps

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        while state.global_step == self._steps and not scrape(self._server)["reranker_engine_sequences"]:
            continue


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return student(tmp_path, 3).eval()


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("mini_batch_size", [3, 32])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.02), ("relative", 0.02)])
def test_equals_the_local_loss_when_its_guide_is_served(
    model: SentenceTransformer,
    bi_encoder: Path,
    bi_encoder_server: ServerProcess,
    columns: int,
    mini_batch_size: int,
    strategy: Any,
    margin: float,
) -> None:
    batch = texts(columns, 8)
    guide = SentenceTransformer(str(bi_encoder), device="cpu").eval()
    options: dict[str, Any] = {
        "temperature": 0.05, "mini_batch_size": mini_batch_size, "margin_strategy": strategy, "margin": margin
    }  # fmt: skip
    reference = CachedGISTEmbedLoss(model, guide, contrast_anchors=False, contrast_positives=False, **options)
    expected = loss_and_gradients(reference, features(model, batch, raw=False))
    with RerankerClient(bi_encoder_server.address) as client:
        loss = RerankerCachedGISTEmbedLoss(model, client, score_type="raw", chunk_pairs=20, **options)
        found = loss_and_gradients(loss, features(model, batch))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_same_gradients(found[1], expected[1])
    assert 0 < loss.statistics.masked_negatives < loss.statistics.negatives
    assert loss.statistics.pairs == 8 * 8 * (columns - 1)


def test_a_cross_encoder_judges_by_probability(
    model: SentenceTransformer, cross_encoder: Path, cross_encoder_server: ServerProcess
) -> None:
    batch = texts(3, 6)
    judge = CrossEncoder(str(cross_encoder), device="cpu", activation_fn=nn.Sigmoid())

    def score(queries: Any, documents: Any) -> Any:
        scores = judge.predict([(query, document) for query in queries for document in documents])
        return np.asarray(scores, np.float32).reshape(len(queries), len(documents))

    options: dict[str, Any] = {"temperature": 0.05, "mini_batch_size": 4, "margin": 0.1}
    for contrast in (False, True):
        more = {**options, "contrast_anchors": contrast, "contrast_positives": contrast, "contrast_filter": "scores"}
        expected = loss_and_gradients(
            RerankerCachedGISTEmbedLoss(model, MemoryScorer(score), **more), features(model, batch)
        )
        loss = RerankerCachedGISTEmbedLoss(model, cross_encoder_server.address, **more)
        found = loss_and_gradients(loss, features(model, batch))
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert_same_gradients(found[1], expected[1])
        assert 0 < loss.statistics.masked_negatives < loss.statistics.negatives


@pytest.mark.parametrize("kind", ["cross_encoder", "bi_encoder"])
def test_distillation_masks_by_the_servers_probabilities(
    model: SentenceTransformer, kind: str, request: pytest.FixtureRequest
) -> None:
    server: ServerProcess = request.getfixturevalue(f"{kind}_server")
    columns = texts(3, 12)
    masks, scores = [], []
    for distillation in (None, Distillation()):
        loss = RerankerCachedGISTEmbedLoss(model, server.address, margin=0.01, distillation=distillation)
        step = loss.begin(columns)
        step.settle(loss._settings())
        masks.append(step.mask(0, 12))
        if distillation is not None:
            scores.append(step.targets(0, 12).scores)
    assert 0 < masks[0].sum() < masks[0].size
    assert np.array_equal(masks[0], masks[1])
    with RerankerClient(server.address) as client:
        raw = client.score_grid(columns[0], columns[1] + columns[2], score_type="raw")
    assert np.allclose(scores[0], raw, rtol=0, atol=1e-6)  # chunks of other sizes round cosines differently


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_run(
    tmp_path: Path, model: SentenceTransformer, bi_encoder: Path, bi_encoder_server: ServerProcess, workers: int
) -> None:
    """The trainer forks its loader workers while the client's thread runs."""
    data = dataset(3, 16)
    served: dict[str, Any] = {"temperature": 0.05, "score_type": "raw"}
    args = arguments(tmp_path, dataloader_num_workers=workers, gradient_accumulation_steps=2, max_steps=4)
    collator = RerankerDataCollator.for_training(model, args)
    histories = []
    guide = SentenceTransformer(str(bi_encoder), device="cpu").eval()
    for reranker in (bi_encoder_server.address, MemoryScorer(cosines_of(guide))):
        twin = SentenceTransformer(modules=list(student(tmp_path, 3)), device="cpu")
        loss = RerankerCachedGISTEmbedLoss(twin, reranker, **served)
        trainer = SentenceTransformerTrainer(
            twin, args, data, eval_dataset=dataset(3, 8), loss=loss, data_collator=collator
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        histories.append([*losses, trainer.evaluate()["eval_loss"]])
        assert loss.statistics.steps == 4 * 2 + 2
    assert histories[0] == pytest.approx(histories[1], abs=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_scored_ahead_and_never_trained_on_ends_on_the_server(
    tmp_path: Path, model: SentenceTransformer, cross_encoder: Path, workers: int
) -> None:
    rows, steps, per_step = 64, 4, 4
    lines = texts(3, rows)
    # Batches after the last step are never scored.
    long = " ".join(["word"] * LONG_TOKENS)
    columns = {
        name: [line[:20] if row < steps * per_step else f"{line} {long}" for row, line in enumerate(column)]
        for name, column in zip(("anchor", "positive", "negative"), lines, strict=True)
    }
    with (
        ServerProcess("--model", str(cross_encoder), "--metrics-port", "0", module="tests.holding") as server,
        RerankerClient(server.address, timeout=WAIT_SECONDS) as client,
    ):
        loss = RerankerCachedGISTEmbedLoss(model, client, temperature=0.05)
        # More batches than steps: batches that are collated ahead of the last step are not used.
        args = arguments(
            tmp_path,
            dataloader_num_workers=workers,
            max_steps=steps,
            per_device_train_batch_size=per_step,
            batch_sampler=in_order,
        )
        collator = RerankerDataCollator.for_training(model, args, loss)
        trainer = SentenceTransformerTrainer(
            model,
            args,
            Dataset.from_dict(columns),
            loss=loss,
            data_collator=collator,
            callbacks=[UntilBegun(server, steps)],
        )
        trainer.train()
        assert loss.statistics.steps == steps
        del trainer
        gc.collect()
        # The engine still holds their pairs: the streams end because they are cancelled, not because they are done.
        names = ("reranker_requests_in_progress", "reranker_queue_sequences", "reranker_engine_sequences")
        cancelled = "RerankStream", "CANCELLED"
        while (
            cancelled not in (left := scrape(server)).by("reranker_requests_total", "rpc", "code")
            or any(left[name] for name in names)
        ):  # fmt: skip
            # Each call gives the server's event loop another turn to notice the cancellation.
            client.model_info()
        assert left["reranker_requests_total", "RerankStream", "OK"] == steps


def test_a_reranker_that_is_not_there_ends_the_step(model: SentenceTransformer) -> None:
    loss = RerankerCachedGISTEmbedLoss(model, "127.0.0.1:1", timeout=0.5)
    with pytest.raises(RerankerUnavailableError, match=r"127\.0\.0\.1:1"):
        loss(features(model, texts(2, 4)), None)
