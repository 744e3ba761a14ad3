"""The loss when servers fail in the middle of training: one model a step, interrupts, errors that stay."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from loss_client import ModelChangedError, RerankerClient, RerankerRequestError
from loss_client.client.errors import RerankerUnavailableError
from loss_client.collator import RerankerDataCollator
from loss_client.loss import RerankerCachedGISTEmbedLoss

from .forked import ensure_fork_server
from .stub_server import Abort, Gate, ReceivedChunk, ReceivedStream, StubServer
from .test_prefetch import batch_of, make, rows
from .training import MemoryScorer, dataset, features, random_scores, student, texts

WAIT_SECONDS = 30.0
GRIDS: dict[str, Any] = {"contrast_positives": True, "contrast_filter": "scores"}  # a step of two jobs
ROUNDS: dict[str, Any] = {
    "candidates": "nearest",
    "top_p": 1 - 1e-6,
}  # a step of two or three jobs, one after the other


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(directory: Path) -> SentenceTransformer:
    return student(directory)


# One model a step


@pytest.mark.parametrize("variant", [GRIDS, ROUNDS])
def test_masks_are_made_of_one_models_scores(
    model: SentenceTransformer, variant: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = features(model, texts(3, 6))
    with StubServer() as first, StubServer(fingerprint="another") as second:
        with RerankerClient([first.target, second.target], timeout=WAIT_SECONDS) as client:
            loss = make(model, client, **variant)
            for _ in range(4):
                loss(inputs, None)
            assert sum(state.condition == "other model" for state in client.servers) == 1
        used = [server for server in (first, second) if any(stream.chunks for stream in server.streams)]
        assert len(used) == 1
    assert len([record for record in caplog.records if "is left out" in record.getMessage()]) == 1


@pytest.mark.parametrize("variant", [GRIDS, ROUNDS])
def test_a_model_that_is_swapped_between_two_jobs_of_a_step_ends_the_step(
    model: SentenceTransformer, variant: dict[str, Any]
) -> None:
    inputs = features(model, texts(3, 6))
    with StubServer() as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        loss = make(model, client, **variant)
        loss(inputs, None)
        # The step's first stream has the model of the step before, and all later streams have another one.
        server.next_fingerprints, server.fingerprint = ["stub"], "another"
        with pytest.raises(ModelChangedError, match="the scores began with the model stub"):
            loss(inputs, None)
        assert loss(inputs, None).isfinite()  # a step of the other model


def test_the_scale_of_raw_scores_is_asked_again_after_the_model_was_swapped(model: SentenceTransformer) -> None:
    with StubServer() as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        loss = make(model, client)
        client.model_info()
        asked: list[str | None] = []
        client.raw_scale = lambda timeout: asked.append(client.fingerprint) or "logit"  # type: ignore[assignment, func-returns-value, method-assign]
        for fingerprint in ("stub", "stub", "another", "another"):
            server.fingerprint = fingerprint
            client.model_info()
            assert loss._scale.read(loss.timeout) == "logit"
    assert asked == ["stub", "another"]


# Errors


@pytest.mark.parametrize("on_error", ["raise", "unfiltered"])
def test_what_failed_ahead_is_asked_for_anew(model: SentenceTransformer, on_error: str) -> None:
    scorer = MemoryScorer(random_scores())
    loss = make(model, scorer, on_error=on_error)
    batch = batch_of(RerankerDataCollator.for_training(model, loss=loss)(rows()))
    scorer.jobs[0].error = RerankerUnavailableError("gone for a while")
    loss(batch, None)
    assert [job.cancelled for job in scorer.jobs] == [True, False]
    assert loss.statistics.unfiltered_steps == 0


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_server_that_refuses_the_caller_ends_training_even_where_steps_may_go_unfiltered(
    model: SentenceTransformer, code: grpc.StatusCode
) -> None:
    async def refuse(*_: object) -> None:
        raise Abort(code, "no")

    with StubServer(on_chunk=refuse) as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        loss = make(model, client, on_error="unfiltered")
        with pytest.raises(RerankerRequestError, match=code.name):
            loss(features(model, texts(2, 4)), None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a program that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("variant", [GRIDS, ROUNDS])
def test_an_interrupt_ends_a_step_that_waits_and_leaves_everything_usable(
    model: SentenceTransformer, variant: dict[str, Any]
) -> None:
    never = Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await never.wait()

    inputs = features(model, texts(3, 6))
    with StubServer(on_chunk=hold) as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        loss = make(model, client, **variant)

        def interrupt() -> None:
            server.wait_for(lambda: server.streams and server.streams[0].half_closed)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            loss(inputs, None)
        thread.join(WAIT_SECONDS)
        server.wait_for(lambda: all(stream.ended for stream in server.streams))
        server.on_chunk = None
        assert loss(inputs, None).isfinite()


# Chunks


def test_chunks_have_the_size_that_the_server_prefers(model: SentenceTransformer) -> None:
    inputs = features(model, texts(2, 8))
    with StubServer(contract=(1, 1), preferred_pairs=8) as server, RerankerClient(server.target) as client:
        for chunk_pairs in (None, 16):
            make(model, client, chunk_pairs=chunk_pairs)(inputs, None)
            assert max(len(chunk.pairs()) for chunk in server.streams[-1].chunks) == (chunk_pairs or 8)


# Other processes


def unpicklable(model: SentenceTransformer, scorer: MemoryScorer) -> RerankerCachedGISTEmbedLoss:
    """Return a loss that cannot be pickled, as one whose model is wrapped by DistributedDataParallel."""
    loss = make(model, scorer)
    loss.lock = threading.Lock()
    return loss


def test_a_collator_goes_to_other_processes_without_its_loss(model: SentenceTransformer) -> None:
    scorer = MemoryScorer(random_scores())
    losses = {"one": unpicklable(model, scorer), "two": model}
    for loss in (losses["one"], losses):
        collator = RerankerDataCollator.for_training(model, loss=loss)
        copy = pickle.loads(pickle.dumps(collator))
        assert collator.loss is loss
        assert copy.loss is None
        named = [{"dataset_name": "one", **row} for row in rows()] if loss is losses else rows()
        assert copy(named).keys() == collator(named).keys()
    # A dataset whose loss needs no texts gets none, in the copy too.
    assert not any("raw_text" in key for key in copy([{"dataset_name": "two", **row} for row in rows()]))


@pytest.mark.parametrize(
    "start", ["forkserver"]
)  # the default from Python 3.14 on; pickles the collator, as spawn does
def test_loader_workers_that_are_not_forked_hand_their_batches_over(model: SentenceTransformer, start: str) -> None:
    ensure_fork_server()
    scorer = MemoryScorer(random_scores())
    collator = RerankerDataCollator.for_training(model, loss=unpicklable(model, scorer))
    loader = DataLoader(
        dataset(3, 8),  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=collator,
        num_workers=1,
        multiprocessing_context=start,
    )
    for batch in loader:
        collator.loss(batch_of(batch), None)  # type: ignore[operator, misc]
    assert [job.documents for job in scorer.jobs] == [
        [text for name in ("positive", "negative_1") for text in dataset(3, 8)[name][begin : begin + 4]]
        for begin in (0, 4)
    ]
    assert not any(job.cancelled for job in scorer.jobs)
