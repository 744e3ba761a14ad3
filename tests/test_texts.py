"""Texts are encoded a slice at a time: an interactive call waits for a slice of bulk work, not for all of it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import numpy as np
import pytest

from reranker_service.models import Layout
from reranker_service.observing.metrics import Metrics
from reranker_service.scheduling import Ticket
from reranker_service.scoring.encoding import TextEncoder
from reranker_service.scoring.texts import TextTable
from reranker_service.scoring.types import ScoringOptions

LONG = "x" * 100_000


class SlowLayout:
    """Waits for ``go`` before it encodes; records the texts of each call."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls: list[list[str]] = []

    def encode_documents(self, texts: list[str], limit: int | None = None) -> list[str]:
        self.calls.append(texts)
        assert self.go.wait(60)
        return [text.upper() for text in texts]


def table(texts: list[str], *, interactive: bool) -> TextTable:
    return TextTable(ScoringOptions(None, 128, raw=False, reject_over_long=False), Ticket(object(), interactive), texts)


async def begin(encoder: TextEncoder, texts: TextTable) -> asyncio.Task[Any]:
    task = asyncio.create_task(encoder.encode(texts, "document", np.arange(len(texts.texts))))
    for _ in range(5):  # until the task waits for its turn
        await asyncio.sleep(0)
    return task


def test_an_interactive_call_waits_for_one_slice_of_a_large_group() -> None:
    async def scenario() -> tuple[list[list[str]], list[Any]]:
        slow = SlowLayout()
        encoder = TextEncoder(cast(Layout, slow), Metrics())
        bulk = await begin(encoder, table([LONG + str(number) for number in range(4)], interactive=False))
        other = await begin(encoder, table(["more"], interactive=False))
        small = await begin(encoder, table(["a", "b"], interactive=True))
        slow.go.set()
        found = await asyncio.gather(bulk, other, small)
        encoder.close()
        return slow.calls, found

    calls, found = asyncio.run(scenario())
    assert [len(call) for call in calls] == [1, 2, 1, 1, 1, 1]
    assert calls[1] == ["a", "b"]
    assert found[0] == [(LONG + str(number)).upper() for number in range(4)]
    assert found[1:] == [["MORE"], ["A", "B"]]


@pytest.mark.parametrize("waiting", [False, True])
def test_encoding_ends_with_the_slice_when_its_client_is_gone(waiting: bool) -> None:
    async def scenario() -> list[list[str]]:
        slow = SlowLayout()
        encoder = TextEncoder(cast(Layout, slow), Metrics())
        first = table([LONG + str(number) for number in range(4)], interactive=False)
        second = table(["gone" if waiting else "stays"], interactive=False)
        bulk, other = await begin(encoder, first), await begin(encoder, second)
        gone, left = (second, bulk) if waiting else (first, other)
        gone.close()
        slow.go.set()
        await left
        encoder.close()
        return slow.calls

    calls = asyncio.run(scenario())
    expected = [LONG + str(number) for number in range(4)] if waiting else [LONG + "0", "stays"]
    assert calls == [[text] for text in expected]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_bulk_texts_are_encoded_while_interactive_texts_never_end(share: float) -> None:
    async def scenario() -> list[str]:
        slow = SlowLayout()
        slow.go.set()
        encoder = TextEncoder(cast(Layout, slow), Metrics(), share)
        bulk = await begin(encoder, table([LONG + "b"] * 40, interactive=False))

        async def quick() -> None:
            for _ in range(25):
                await encoder.encode(table([LONG + "q"], interactive=True), "document", np.arange(1))

        await asyncio.gather(*(quick() for _ in range(4)))
        seen = [texts[0][-1] for texts in slow.calls]
        await bulk
        encoder.close()
        return seen

    seen = asyncio.run(scenario())
    contested = seen[seen.index("q") :]
    assert contested.count("b") == pytest.approx(share * len(contested), abs=2)
