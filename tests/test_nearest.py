"""Preselection: leads choose known pairs, texts are embedded once, and the number of pairs follows the servers."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loss_client.client.errors import JobCancelledError
from loss_client.client.scores import ScoreUsage
from loss_client.filter.nearest.cancellation import Cancellation
from loss_client.filter.nearest.choice import Best, Choice, Side, choose
from loss_client.filter.nearest.embeddings import EmbeddingMemory
from loss_client.filter.nearest.nearest import sides_of
from loss_client.filter.nearest.pace import FIRST, Pace
from loss_client.filter.nearest.preselector import EmbeddingPreselector, make_preselector
from loss_client.filter.nearest.worker import Worker

WAIT_SECONDS = 20.0


def embed(texts: Sequence[str], dimensions: int = 6) -> NDArray[np.float32]:
    """Embed texts at random, equal texts alike."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=dimensions) for text in texts])


def cosine(one: str, other: str) -> float:
    first, second = embed([one, other])
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def chosen(choice: Choice, kind: slice) -> list[tuple[str, str]]:
    pairs = zip(choice.query_ids[kind].tolist(), choice.document_ids[kind].tolist(), strict=True)
    return [(choice.queries[query], choice.documents[document]) for query, document in pairs]


def choose_in(sides: Sequence[Side], count: int, drawn: int = 0) -> Choice:
    generator = np.random.default_rng(0)
    return choose(EmbeddingPreselector(embed), sides, count, drawn, generator, Cancellation())


COLUMNS = [
    [f"a{row}" for row in range(7)] + ["a0"],  # two rows with one anchor
    [f"p{row}" for row in range(6)] + ["p1", "p7"],  # two rows with one positive
    ["n0", "p2", "n2", "n3", "n0", "n5", "n6", "a3"],
]


def leads(contrast: tuple[bool, bool]) -> dict[tuple[str, str], float]:
    """Return the lead of every pair that may be chosen, row by row, by brute force."""
    anchors, positives, negatives = COLUMNS
    documents = {*positives, *negatives, *(anchors if contrast[0] else [])}
    found: dict[tuple[str, str], float] = {}
    own = {*zip(anchors, positives, strict=True), *zip(anchors, negatives, strict=True)}
    for anchor, positive in zip(anchors, positives, strict=True):
        threshold = cosine(anchor, positive)
        pairs = [(anchor, document) for document in documents]
        if contrast[1]:
            pairs += [(positive, other) for other in positives]
        for query, document in pairs:
            itself = query == document and not (query == anchor and document in {*positives, *negatives})
            if (query, document) not in own and not itself:
                lead = cosine(query, document) - threshold
                found[query, document] = max(lead, found.get((query, document), -9.0))
    return found


@pytest.mark.parametrize("contrast", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("count", [0, 1, 10, 10_000])
def test_the_pairs_with_the_largest_leads_are_chosen(contrast: tuple[bool, bool], count: int) -> None:
    expected = sorted(leads(contrast).items(), key=lambda item: -item[1])
    choice = choose_in(sides_of(COLUMNS, COLUMNS, contrast), count)
    found = chosen(choice, slice(None))
    assert len(set(found)) == len(found) == min(count, len(expected))
    assert set(found) == {pair for pair, _ in expected[:count]}
    # Stored embeddings are float16.
    np.testing.assert_allclose(choice.leads, [lead for _, lead in expected[:count]], atol=5e-3)


def test_other_ranks_documents_are_chosen_without_those_of_this_rank() -> None:
    columns = [column[:3] for column in COLUMNS]
    found = chosen(choose_in(sides_of(columns, COLUMNS, (False, False)), 10_000), slice(None))
    local = {*columns[1], *columns[2]}
    others = {*COLUMNS[1], *COLUMNS[2]} - local
    assert set(found) == {(anchor, document) for anchor in columns[0] for document in others}


def test_bands_fall_in_lead_and_random_pairs_come_first() -> None:
    choice = choose_in(sides_of(COLUMNS, COLUMNS, (False, False)), 8, drawn=5)
    assert choice.bands().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, *[0] * 5]
    assert (np.diff(choice.leads) <= 0).all()


def test_random_pairs_are_drawn_among_all_that_may_be_chosen() -> None:
    allowed = set(leads((False, False)))
    choice = choose_in(sides_of(COLUMNS, COLUMNS, (False, False)), 3, drawn=5)
    drawn = chosen(choice, slice(3, None))
    assert len(set(drawn)) == 5
    assert set(drawn) <= allowed
    assert choice.pairs == len(allowed)


def test_few_are_kept_of_many() -> None:
    values = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)
    best = Best(25, documents=40)
    for begin in range(0, 300, 7):
        best.add(values[begin : begin + 7], begin, 0)
        best._cut()
    codes, found = best.result()
    order = np.argsort(-values.reshape(-1))[:25]
    assert codes.tolist() == order.tolist()
    np.testing.assert_array_equal(found, values.reshape(-1)[order])


def test_a_cancelled_choice_embeds_no_more() -> None:
    cancellation = Cancellation()

    def embed_once(texts: list[str]) -> NDArray[np.float32]:
        cancellation.cancel()
        return embed(texts)

    sides = [Side(["a"], [["p"]], [f"d{number}" for number in range(600)])]
    preselector = EmbeddingPreselector(embed_once)
    with pytest.raises(JobCancelledError):
        choose(preselector, sides, 1, 0, np.random.default_rng(0), cancellation)
    with pytest.raises(JobCancelledError):
        cancellation.begin(lambda: pytest.fail("a job began after the cancellation"))


@dataclass
class Counted:
    """Embeds texts and remembers which ones."""

    texts: list[str] = field(default_factory=list)

    def __call__(self, texts: list[str]) -> Any:
        self.texts += texts
        return embed(texts)


def test_each_text_is_embedded_once_and_the_memory_is_bounded() -> None:
    memory, counted = EmbeddingMemory(4), Counted()
    exact = embed(["a", "b", "c", "d", "e"])
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(memory.read(["a", "b", "c"], counted), exact[:3], rtol=1e-6)
    np.testing.assert_allclose(memory.read(["c", "a"], counted), exact[[2, 0]], atol=1e-3)
    assert counted.texts == ["a", "b", "c"]
    memory.read(["d", "e"], counted)  # "b" was used last of all
    assert len(memory) == 4
    np.testing.assert_allclose(memory.read(["a", "c", "d", "e"], counted), exact[[0, 2, 3, 4]], atol=1e-3)
    assert counted.texts == ["a", "b", "c", "d", "e"]
    # More texts than the memory holds: all are returned.
    many = [f"t{number}" for number in range(9)]
    assert memory.read([*many, "e"], counted).shape == (10, 6)
    assert len(memory) == 4
    # Another way to embed has embeddings of its own.
    memory.read(["t8"], counted, kind="document")
    assert counted.texts[5:] == [*many, "t8"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), r"array of shape \(3,\) for 2 texts; it has to return one embedding for each"),
        (np.zeros((3, 4)), r"shape \(3, 4\) for 2 texts"),
        (np.full((2, 4), np.nan), "not finite"),
    ],
)
def test_wrong_embeddings_are_refused(returned: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingMemory().read(["a", "b"], lambda texts: returned)
    memory = EmbeddingMemory()
    memory.read(["a"], lambda texts: np.ones((1, 3)))
    with pytest.raises(ValueError, match="4 dimensions after embeddings of 3"):
        memory.read(["b"], lambda texts: np.ones((1, 4)))


def test_something_else_is_no_preselector() -> None:
    with pytest.raises(TypeError, match=r"preselector must be .* not a int"):
        make_preselector(3, SimpleNamespace())  # type: ignore[arg-type]


def test_work_is_done_in_order_and_errors_reach_the_reader() -> None:
    worker, gate = Worker(), threading.Event()
    order: list[int] = []

    def work(number: int) -> None:
        gate.wait(WAIT_SECONDS)
        order.append(number)

    first, second = worker.submit(lambda: work(1)), worker.submit(lambda: work(2))
    third, fourth = worker.submit(lambda: 1 / 0), worker.submit(lambda: work(4))
    assert second.cancel()
    assert not first.done()
    gate.set()
    with pytest.raises(ZeroDivisionError):
        third.result(WAIT_SECONDS)
    fourth.result(WAIT_SECONDS)
    assert order == [1, 4]
    assert pickle.loads(pickle.dumps(worker)).submit(lambda: 5).result(WAIT_SECONDS) == 5


class Servers:
    """Servers of a fixed speed and a training, on a clock of their own.

    While a batch trains, the servers score the next one: own documents first, then preselected pairs, which are
    cancelled when the training needs them.
    """

    def __init__(self, pairs_a_second: float, step_seconds: float) -> None:
        self.rate = pairs_a_second
        self.step_seconds = step_seconds
        self.now = 0.0
        self.late = 0
        self.pace = Pace(lambda: self.now)

    def step(self, anchors: int = 100, own: int = 100) -> float:
        """Train on a batch; return the seconds that it took."""
        begun, asked = self.now, round(self.pace.per_anchor * anchors)
        self.pace.take(training=True)
        waited = max(0.0, own / self.rate - self.step_seconds)
        self.now = begun + self.step_seconds + waited
        arrived = min(asked, round(self.rate * (self.now - begun)) - own)
        ends = begun + own / self.rate, min(begun + (own + asked) / self.rate, self.now)
        self.late = asked - arrived
        jobs: Any = [
            SimpleNamespace(span=(begun, end), usage=ScoreUsage(pairs=pairs))
            for end, pairs in zip(ends, (own, arrived), strict=True)
        ]
        self.pace.record(anchors, jobs, self.now - begun, waited)
        return self.now - begun


@pytest.mark.parametrize("speed", [0.5, 3.0, 10.0, 400.0])
def test_as_many_pairs_are_asked_for_as_the_servers_score_during_a_step(speed: float) -> None:
    servers = Servers(speed * 100, 1.0)
    assert servers.pace.per_anchor == FIRST
    for _ in range(10):
        assert servers.step() <= 1.05 * max(1.0, 1 / speed)
    assert servers.pace.per_anchor == pytest.approx(max(0.0, 0.9 * speed - 1), rel=0.02)
    assert servers.late == 0


def test_the_number_follows_a_change_of_speed() -> None:
    servers = Servers(2_000, 0.5)
    for _ in range(10):
        servers.step()
    before = servers.pace.per_anchor
    servers.rate /= 4
    for _ in range(10):
        servers.step()
    assert servers.pace.per_anchor == pytest.approx((before + 1) / 4 - 1, rel=0.02)
    servers.rate *= 8
    for _ in range(10):
        servers.step()
    assert servers.pace.per_anchor == pytest.approx((before + 1) * 2 - 1, rel=0.02)


def test_an_evaluation_is_not_measured() -> None:
    servers = Servers(1_000, 1.0)
    for _ in range(9):
        servers.step()
    before = servers.pace.per_anchor
    servers.pace.take(training=False)
    servers.now += 1_000
    servers.pace.record(100, [], None, 0.0)
    servers.step()
    assert servers.pace.per_anchor == pytest.approx(before)
