"""Jobs of training steps: served in the order of the steps, with no others in front of a job that is waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from loss_client import ClientClosedError, JobCancelledError, RerankerClient, ScoreError, ScoreMatrix

from .stub_server import WAIT_SECONDS, Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores, numbered_texts

ROWS = 16
DOCUMENTS = numbered_texts("document", 4)


class Held:
    """A server that answers the chunks of a query only once that query is let through."""

    def __init__(self, server: StubServer) -> None:
        self.server = server
        self._gates: dict[str, Gate] = {}
        server.on_chunk = self._hold

    def let(self, *queries: str) -> None:
        for query in queries:
            self._gates.setdefault(query, Gate()).open()

    def asked(self, query: str) -> bool:
        return any(query in chunk.queries for stream in self.server.streams for chunk in stream.chunks)

    def wait_until_asked(self, query: str) -> None:
        self.server.wait_for(lambda: self.asked(query), f"the server to be asked for {query}")

    async def _hold(self, stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await asyncio.gather(*(self._gates.setdefault(query, Gate()).wait() for query in chunk.queries))


@pytest.fixture
def held() -> Iterator[Held]:
    with StubServer() as server:
        yield Held(server)


@pytest.fixture
def client(held: Held) -> Iterator[RerankerClient]:
    with RerankerClient(held.server.target, timeout=WAIT_SECONDS) as client:
        yield client


def queries_of(name: str) -> list[str]:
    return numbered_texts(name, ROWS)


def begin(client: Any, name: str, **options: Any) -> ScoreMatrix:
    """Begin a job whose chunks each have two of the queries."""
    matrix: ScoreMatrix = client.stream_grid(queries_of(name), DOCUMENTS, chunk_pairs=len(DOCUMENTS), **options)
    return matrix


def pass_by(held: Held, client: RerankerClient) -> None:
    """Score a pair outside of the order; jobs that may begin have done so when it is complete."""
    held.let("passing")
    client.score_pairs([("passing", f"{len(held.server.streams)}")])


def assert_complete(matrix: ScoreMatrix, name: str) -> None:
    np.testing.assert_array_equal(matrix.result(WAIT_SECONDS), hash_scores(queries_of(name), DOCUMENTS))


def test_steps_are_served_in_order_and_the_next_begins_before_the_first_is_complete(
    held: Held, client: RerankerClient
) -> None:
    names = ["first", "second", "third"]
    views = [client.one_model() for _ in names]
    matrices = [begin(view, name) for view, name in zip(views, names, strict=True)]
    held.wait_until_asked("first 0 ü")
    pass_by(held, client)
    assert not held.asked("second 0 ü")
    held.let(*queries_of("first")[: ROWS // 2])
    matrices[0].rows(0, ROWS // 2)
    pass_by(held, client)
    assert not held.asked("second 0 ü")
    held.let(*queries_of("first")[ROWS // 2 : -1])  # all but the last two rows
    held.wait_until_asked("second 0 ü")
    held.let(*queries_of("second")[:-1])
    matrices[1].rows(0, ROWS - 2)
    pass_by(held, client)
    assert not held.asked("third 0 ü"), "two steps are running"
    held.let("first 15 ü")
    held.wait_until_asked("third 0 ü")
    held.let("second 15 ü", *queries_of("third"))
    for matrix, name in zip(matrices, names, strict=True):
        assert_complete(matrix, name)


def test_other_work_does_not_wait_for_steps(held: Held, client: RerankerClient) -> None:
    begin(client.one_model(), "first")
    urgent, plain = begin(client.one_model(), "urgent", priority="interactive"), begin(client, "plain")
    held.let(*queries_of("urgent"), *queries_of("plain"), "pair", "grid")
    assert_complete(urgent, "urgent")
    assert_complete(plain, "plain")
    assert client.score_pairs([("pair", "d")]).shape == (1,)
    assert client.score_grid(["grid"], ["d"]).shape == (1, 1)
    assert client.one_model().raw_scale() == "logit"


def test_a_later_job_of_an_earlier_step_begins_at_once(held: Held, client: RerankerClient) -> None:
    first, second, third = (client.one_model() for _ in range(3))
    held.let(*queries_of("first"))
    assert_complete(begin(first, "first"), "first")
    waiting = [begin(second, "second"), begin(third, "third")]
    held.wait_until_asked("second 0 ü")
    begin(first, "more")
    held.wait_until_asked("more 0 ü")
    assert not held.asked("third 0 ü")
    held.let(*queries_of("second"), *queries_of("more"), *queries_of("third"))
    assert_complete(waiting[1], "third")


def test_jobs_of_one_step_run_together(held: Held, client: RerankerClient) -> None:
    step = client.one_model()
    begin(step, "first")
    begin(step, "beside")
    held.wait_until_asked("first 0 ü")
    held.wait_until_asked("beside 0 ü")


def test_a_job_begins_once_a_reader_waits_for_it(held: Held, client: RerankerClient) -> None:
    begin(client.one_model(), "first")
    second, third = begin(client.one_model(), "second"), begin(client.one_model(), "third")
    held.wait_until_asked("first 0 ü")
    held.let(*queries_of("third"))
    assert_complete(third, "third")
    pass_by(held, client)
    assert not held.asked("second 0 ü")
    assert not second.done()


def test_a_cancelled_job_makes_way(held: Held, client: RerankerClient) -> None:
    first, second, third = (begin(client.one_model(), name) for name in ("first", "second", "third"))
    held.wait_until_asked("first 0 ü")
    held.let(*queries_of("third"))
    second.cancel()
    first.cancel()
    assert_complete(third, "third")
    for matrix in (first, second):
        with pytest.raises(JobCancelledError):
            matrix.result(WAIT_SECONDS)
    assert not held.asked("second 0 ü")


def test_a_failed_job_makes_way(held: Held, client: RerankerClient) -> None:
    first, second = (begin(client.one_model(), name) for name in ("first", "second"))
    held.wait_until_asked("first 0 ü")
    held.server.score = lambda queries, documents, _: np.full((len(queries), len(documents)), np.nan, dtype=np.float32)
    held.let("first 0 ü", "first 1 ü")
    held.wait_until_asked("second 0 ü")
    with pytest.raises(ScoreError, match="not finite"):
        first.result(WAIT_SECONDS)
    second.cancel()


def test_closing_ends_jobs_that_wait(held: Held, client: RerankerClient) -> None:
    begin(client.one_model(), "first")
    second = begin(client.one_model(), "second")
    held.wait_until_asked("first 0 ü")
    client.close()
    with pytest.raises(ClientClosedError, match="closed before these scores arrived"):
        second.result(WAIT_SECONDS)
    assert not held.asked("second 0 ü")


def test_the_timeout_of_a_job_begins_when_it_does(held: Held, client: RerankerClient) -> None:
    seconds = 0.2
    begin(client.one_model(), "first")
    second = begin(client.one_model(), "second", timeout=seconds)
    held.wait_until_asked("first 0 ü")
    held.let(*queries_of("second"))
    time.sleep(2 * seconds)
    assert second.error is None
    held.let(*queries_of("first"))
    assert_complete(second, "second")
