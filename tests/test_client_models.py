"""RerankerClient with several servers: which one comes first, and scores of one model only."""

from __future__ import annotations

import asyncio
import logging
import random

import grpc
import numpy as np
import pytest

from loss_client import ModelChangedError, RerankerClient, ServerState
from loss_client.client import endpoints, spread
from loss_client.client.turns import first_turn
from reranker.v1 import reranker_pb2 as pb
from tests.stub_server import Abort, Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores

WAIT_SECONDS = 30.0
MASTER = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}


# Turns


def test_ranks_begin_at_different_servers_whatever_seed_the_training_sets() -> None:
    random.seed(42)
    assert sorted(first_turn(4, {**MASTER, "RANK": str(rank)}) for rank in range(4)) == [0, 1, 2, 3]
    assert {first_turn(1000, {}) for _ in range(20)} != {first_turn(1000, {})}


def test_ranks_that_start_together_spread_their_first_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [endpoints.connect_seconds({"WORLD_SIZE": str(ranks)}) for ranks in (1, 8, 512, 4096)]
    assert seconds == [0, 0.016, 1.0, 1.0]
    assert endpoints.connect_seconds({}) == endpoints.connect_seconds({"WORLD_SIZE": "x"}) == 0
    monkeypatch.setenv("WORLD_SIZE", "512")
    asked: list[tuple[float, float]] = []

    class Generator:
        def uniform(self, low: float, high: float) -> float:
            asked.append((low, high))
            return 0.0

    monkeypatch.setattr(endpoints, "_generator", Generator())
    with StubServer() as server, RerankerClient(server.target) as client:
        for _ in range(2):
            client.stream_grid(["a"], ["b"]).result(timeout=WAIT_SECONDS)
    assert asked == [(0, 1.0)]  # not again for a connection that is open


def test_an_address_that_is_given_twice_gets_two_streams_of_a_job() -> None:
    with StubServer(contract=(1, 1)) as server, RerankerClient([server.target] * 2) as client:
        texts = [str(number) for number in range(64)]
        matrix = client.stream_grid(texts, texts, score_type="raw", chunk_pairs=16)
        matrix.result(timeout=WAIT_SECONDS)
        assert len(server.streams) == 2


@pytest.mark.parametrize("hangs", [False, True])
def test_streams_at_one_address_open_one_after_the_other(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    monkeypatch.setattr(spread, "_OPEN_SECONDS", 0.2 if hangs else WAIT_SECONDS)
    gate, opening, most = Gate(), 0, 0

    async def hold(stream: ReceivedStream) -> None:
        nonlocal opening, most
        opening += 1
        most = max(most, opening)
        if hangs and stream.number == 0:
            await gate.wait()
        await asyncio.sleep(0.02)  # a burst of streams would arrive within this time
        opening -= 1

    async def hold_chunk(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await gate.wait()

    with StubServer(contract=(1, 1), on_chunk=hold_chunk) as server, RerankerClient([server.target] * 4) as client:
        server.on_open = hold
        texts = [str(number) for number in range(64)]
        matrix = client.stream_grid(texts, texts, score_type="raw", chunk_pairs=16)
        # One that hangs keeps the others waiting for a moment only.
        server.wait_for(lambda: len(server.streams) == 4 and opening == int(hangs))
        gate.open()
        matrix.result(timeout=WAIT_SECONDS)
    assert most == 1 + hangs


def test_four_ranks_spread_over_four_servers_and_leave_the_global_random_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = [StubServer(), StubServer(), StubServer(), StubServer()]
    with servers[0], servers[1], servers[2], servers[3]:
        addresses = [server.target for server in servers]
        for name, value in MASTER.items():
            monkeypatch.setenv(name, value)
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            random.seed(42)
            before = random.getstate()
            with RerankerClient(addresses, timeout=WAIT_SECONDS) as client:
                client.score_grid([f"step of rank {rank}"], ["d"])
            assert random.getstate() == before
        assert [len(server.streams) for server in servers] == [1, 1, 1, 1]


def test_a_reconnect_leaves_the_global_random_state_alone() -> None:
    random.seed(42)
    before = random.getstate()

    async def break_first(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if stream.number == 0:
            raise Abort(grpc.StatusCode.UNAVAILABLE, "going away")

    with StubServer(on_chunk=break_first) as server, RerankerClient(server.target) as client:
        client.score_grid(["q"], ["d"])
        assert len(server.streams) == 2
    assert random.getstate() == before


# One model


@pytest.mark.parametrize("ask", ["stream", "rerank", "batch", "info"])
def test_a_server_of_another_model_is_left_out_with_one_warning(ask: str, caplog: pytest.LogCaptureFixture) -> None:
    without = {"RerankStream"} if ask == "batch" else set()
    with (
        StubServer(contract=(1, 1), without=without) as first,
        StubServer(contract=(1, 1), without=without) as second,
        StubServer(contract=(1, 1), without=without, fingerprint="another") as other,
        caplog.at_level(logging.WARNING, "loss_client"),
        RerankerClient([other.target, first.target, second.target], timeout=WAIT_SECONDS) as client,
    ):
        assert {state.condition for state in client.servers} == {"unused"}
        for number in range(6):
            if ask == "rerank":
                client.rerank("q", ["d"])
            elif ask == "info":
                assert client.model_info().fingerprint == "stub"
            else:
                client.score_grid([f"q{number}"], ["d"])
        assert client.fingerprint == "stub"
        assert client.servers[0] == ServerState(other.target, "other model", "another")
        assert {state.fingerprint for state in client.servers[1:]} == {"stub"}
        assert not other.streams
        assert not other.requests
    warnings = [record.getMessage() for record in caplog.records if "serves the model another" in record.getMessage()]
    assert len(warnings) == 1
    assert other.target in warnings[0]


def test_all_jobs_of_a_step_have_scores_of_one_model() -> None:
    with StubServer() as first, StubServer() as second:
        with RerankerClient([first.target, second.target], timeout=WAIT_SECONDS) as client:
            client.score_grid(["q"], ["d"])
            first.fingerprint = second.fingerprint = "new"
            # The client's model is gone; a step that has no scores yet takes the new one and keeps to it.
            step = client.one_model()
            np.testing.assert_array_equal(
                step.stream_grid(["q"], ["d"]).result(WAIT_SECONDS), hash_scores(["q"], ["d"])
            )
            first.fingerprint = "stub"
            for _ in range(4):
                step.stream_pairs(["q"], ["e"], [0], [0]).result(WAIT_SECONDS)
            assert step.raw_scale() == "logit"
            asked = len(first.streams), len(second.streams)
            second.fingerprint = "newest"
            with pytest.raises(ModelChangedError, match=r"model new and cannot continue .* Serve the same model"):
                step.stream_grid(["r"], ["d"]).result(WAIT_SECONDS)
            with pytest.raises(ModelChangedError):
                step.raw_scale()
            assert (len(first.streams), len(second.streams)) != asked  # they were asked for their models once more
            assert client.one_model().stream_grid(["r"], ["d"]).result(WAIT_SECONDS).shape == (1, 1)


def test_a_swapped_model_is_seen_in_unary_replies_too(caplog: pytest.LogCaptureFixture) -> None:
    with StubServer(contract=(1, 1)) as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        client.rerank("q", ["d"])
        server.fingerprint = "another"
        with caplog.at_level(logging.WARNING, "loss_client"):
            client.rerank("q", ["d"])
        assert client.fingerprint == "another"
    assert "from now on scores come from the model another" in caplog.text


def test_batches_of_one_job_do_not_mix_models() -> None:
    with StubServer(contract=(1, 1), without={"RerankStream"}) as server:

        async def swap(request: pb.RerankBatchRequest) -> None:
            if len(server.requests) > 2:
                server.fingerprint = "another"

        server.on_request = swap
        with RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
            with pytest.raises(ModelChangedError, match="began with the model stub"):
                client.score_grid([f"q{number}" for number in range(12)], ["d"], chunk_pairs=1)


def test_a_server_that_serves_the_right_model_again_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loss_client.client.endpoints._OTHER_MODEL_SECONDS", 0.0)
    with StubServer() as first, StubServer() as second, StubServer(fingerprint="another") as other:
        addresses = [first.target, second.target, other.target]
        with RerankerClient(addresses, timeout=WAIT_SECONDS) as client:
            client.score_grid(["q"], ["d"])
            other.fingerprint = "stub"
            for _ in range(3):
                client.score_grid(["q"], ["d"])
            assert [state.condition for state in client.servers] == ["working"] * 3


def test_a_long_job_returns_to_a_server_that_had_another_model_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loss_client.client.endpoints._OTHER_MODEL_SECONDS", 0.0)
    with StubServer() as first, StubServer(fingerprint="another") as second:

        async def break_after_one_chunk(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
            if chunk.number == 1:
                if len(first.streams) == 5:
                    first.fingerprint, second.fingerprint = "another", "stub"
                raise Abort(grpc.StatusCode.UNAVAILABLE, "going away")

        first.on_chunk = break_after_one_chunk
        with RerankerClient([first.target, second.target], timeout=WAIT_SECONDS) as client:
            documents = [f"d{number}" for number in range(20)]
            scores = client.score_grid(["q"], documents, chunk_pairs=1)
            np.testing.assert_array_equal(scores, hash_scores(["q"], documents))
        assert len(second.streams) > 3  # of another model, but for the last


def test_a_name_for_servers_of_two_models_is_tried_again() -> None:
    with StubServer() as server, RerankerClient(server.target, timeout=WAIT_SECONDS) as client:
        step = client.one_model()
        step.stream_grid(["q"], ["d"]).result(WAIT_SECONDS)
        # The name leads to a server of another model at the next attempt, and to one of the right model after it.
        server.next_fingerprints = ["another", "stub"]
        np.testing.assert_array_equal(step.stream_grid(["r"], ["d"]).result(WAIT_SECONDS), hash_scores(["r"], ["d"]))
        assert len(server.streams) == 3
