"""Fault: a server whose budget of bytes another client holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc

from chaos.run import Run
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

_BUDGET_BYTES = 4 << 20
# Together more than the budget.
_PIECES = 200
_PIECE_BYTES = 32 << 10
# The server reads no further message for so long: the budget is full.
_FULL_SECONDS = 0.4
_SHORT_SECONDS = 1.5
# Longer than the server lets a stream wait for room: it then refuses streams, and names a delay.
_LONG_SECONDS = 11.5
_LONG_EVERY = 5


def full_budget(run: Run) -> None:
    """Fill a server's budget for some time, several times for so long that the server refuses streams."""
    # Short streams, so that most of them are younger than the one that holds the budget, and are refused before it.
    flags = ("--memory-bytes", str(_BUDGET_BYTES), "--limits.max-chunks-per-stream", "32")
    with run.serving(1, *flags, rate=2 * run.sizes.rate) as (server,), run.jobs([server]):
        for number in run.injections:
            long = number % _LONG_EVERY == _LONG_EVERY - 1
            if not _fill(server.address, _LONG_SECONDS if long else _SHORT_SECONDS * run.sizes.pace):
                run.injections.undo()
            run.pause(0.2, 1.0)


def _fill(address: str, seconds: float) -> bool:
    """Fill the budget and keep it full for some seconds; returns whether it was full."""
    ended = threading.Event()
    last_read = time.monotonic()

    def requests() -> Iterator[pb.RerankStreamRequest]:
        nonlocal last_read
        yield pb.RerankStreamRequest(open=pb.StreamOpen())
        piece = pb.RerankStreamRequest(texts=pb.StreamTexts(texts=["x" * _PIECE_BYTES]))
        for _ in range(_PIECES):
            last_read = time.monotonic()
            yield piece
        ended.wait()

    with grpc.insecure_channel(address) as channel:
        call = rpc.RerankerServiceStub(channel).RerankStream(requests())
        call.add_callback(ended.set)
        while not ended.is_set() and time.monotonic() < last_read + _FULL_SECONDS:
            time.sleep(_FULL_SECONDS / 10)
        full = not ended.is_set()
        ended.wait(seconds)
        call.cancel()
        ended.set()
    return full
