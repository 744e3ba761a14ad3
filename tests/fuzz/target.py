"""Target: the server under attack, its right scores, and checks of its memory, open files, books and health."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import grpc
import psutil
from transformers import AutoTokenizer

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc

from ..forked import ForkedProgram
from ..scrapes import scrape
from ..servers import ServerProcess
from .closed_form import PRIME
from .reconnecting import LOST, RECONNECT

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
"""Budget of the server, ``--memory-bytes``."""
TEXTS = [f"{word} number {number}" for number in range(8) for word in ("query", "document", "naïve – text")]
"""Texts with known scores."""
HEALTH_SECONDS = 1.0
"""Longest time that a health check may take."""


class Target:
    """A running server and what is known about it.

    Attributes:
        server: The process.
        address: Its ``HOST:PORT``.
        scores: Right raw scores of ``TEXTS`` x ``TEXTS``, by pair.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        """Start the server; it ends with the ``with`` block."""
        self.scores = _closed_form(model)
        self.server = ServerProcess(
            *("--model", str(model), "--engine", "torch", "--threads", "1", "--metrics-port", "0"),
            # A larger cache would grow with every new text for longer than a test runs.
            *("--cache-bytes", str(4 * MIB), "--memory-bytes", str(MEMORY_BYTES), *flags),
            module="tests.fuzz.closed_form",
        )
        self.address = self.server.address
        self._process = psutil.Process(self.server.pid)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.server.stop()

    def resident(self) -> int:
        """Bytes of resident memory."""
        return int(self._process.memory_info().rss)

    def open_files(self) -> int:
        """Number of open file descriptors."""
        return int(self._process.num_fds())

    def check_scores(self, seconds: float = 20.0) -> None:
        """Check that the server gives right scores in every scoring RPC.

        As every client does, it tries again after a status that says that a connection was lost.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._check_scores(seconds)
                return
            except grpc.RpcError as error:
                if error.code() not in LOST or time.monotonic() > deadline:
                    raise

    def _check_scores(self, seconds: float) -> None:
        with grpc.insecure_channel(self.address, RECONNECT) as channel:
            stub = rpc.RerankerServiceStub(channel)
            request = pb.RerankRequest(query=TEXTS[0], documents=TEXTS)
            reply = stub.Rerank(request, timeout=seconds, wait_for_ready=True)
            assert self.is_right(request, reply)
            batch = stub.RerankBatch(pb.RerankBatchRequest(requests=[request] * 2), timeout=seconds)
            assert all(self.is_right(request, one.response) for one in batch.items)
            ids = range(len(TEXTS))
            grid = pb.PairGrid(query_ids=ids, document_ids=ids)
            messages = [
                pb.RerankStreamRequest(open=pb.StreamOpen()),
                pb.RerankStreamRequest(texts=pb.StreamTexts(texts=TEXTS)),
                pb.RerankStreamRequest(chunk=pb.StreamChunk(id=1, grid=grid)),
            ]
            _, result = stub.RerankStream(iter(messages), timeout=seconds)
            assert self.are_right([(a, b) for a in TEXTS for b in TEXTS], result.result.scores.values)

    def is_right(self, request: pb.RerankRequest, reply: pb.RerankResponse) -> bool:
        """Whether a ranking of known texts has the right scores and documents, and is sorted."""
        shown = [one.score for one in reply.results]
        pairs = [(request.query, request.documents[one.index]) for one in reply.results]
        top = min(request.top_n, len(request.documents)) if request.HasField("top_n") else len(request.documents)
        return (
            len(shown) == top
            and shown == sorted(shown, reverse=True)
            and all(one.document in ("", text) for one, (_, text) in zip(reply.results, pairs, strict=True))
            and self.are_right(pairs, shown, raw=request.options.score_type == pb.SCORE_TYPE_RAW)
        )

    def are_right(self, pairs: Sequence[tuple[str, str]], scores: Sequence[float], *, raw: bool = False) -> bool:
        """Whether scores are those of pairs of known texts."""
        expected = [self.scores[pair] for pair in pairs]
        if not raw:
            expected = [1 / (1 + math.exp(-one)) for one in expected]
        return len(scores) == len(expected) and all(
            abs(found - right) < 1e-5 for found, right in zip(scores, expected, strict=True)
        )

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until no call is in flight and no byte is held. Raises ``AssertionError`` if that does not happen."""
        deadline = time.monotonic() + seconds
        while True:
            page = scrape(self.server)
            left = {
                "calls": page["reranker_requests_in_progress"],
                "bytes": page["reranker_held_bytes"],
                "waiting": page["reranker_queue_sequences"],
                "running": page["reranker_engine_sequences"],
            }
            if not any(left.values()):
                return
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Ask for health every tenth of a second, and note the largest memory, as long as the context lasts."""
        watch = Watch(self)
        watch.start()
        thread = threading.Thread(target=watch.run)
        thread.start()
        try:
            yield watch
        finally:
            watch.done.set()
            thread.join()
            watch.end()


class Watch:
    """Health and memory of a server over some time.

    Attributes:
        slowest: Longest time that a health check took, in seconds; set when the watch has ended.
        failures: Statuses of failed health checks.
        checks: Number of health checks.
        before: Resident bytes at the begin.
        peak: Most resident bytes.
        done: Ends the watch.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self.slowest = 0.0
        self.failures: list[str] = []
        self.checks = 0
        self.before = self.peak = target.resident()
        self.done = threading.Event()

    @property
    def growth(self) -> int:
        """Bytes by which the memory grew, at its peak."""
        return self.peak - self.before

    def start(self) -> None:
        """Start the prober, a process of its own."""
        command = [sys.executable, "-m", "tests.fuzz.prober", self._target.address]
        self._prober = ForkedProgram(command, stdout=subprocess.PIPE)
        assert self._prober.stdout is not None
        assert self._prober.stdout.readline() == "ready\n"

    def run(self) -> None:
        """Note the memory until ``done`` is set."""
        while not self.done.wait(0.1):
            self.peak = max(self.peak, self._target.resident())

    def end(self) -> None:
        """End the prober, and take over what it saw."""
        self._prober.terminate()
        assert self._prober.stdout is not None
        with self._prober.stdout as output:
            seen = json.loads(output.read())
        self.slowest, self.checks, self.failures = seen["slowest"], seen["checks"], seen["failures"]
        self._prober.wait(30)

    def check(self, growth: int, seconds: float = HEALTH_SECONDS) -> None:
        """Check that health was answered in time, and that the memory stayed inside a bound."""
        assert not self.failures, self.failures
        assert self.checks
        assert self.slowest < seconds, f"a health check took {self.slowest:.2f} s"
        assert self.growth < growth, f"the server grew by {self.growth / MIB:.0f} MiB; the bound is {growth / MIB:.0f}"


def _closed_form(model: Path) -> dict[tuple[str, str], float]:
    """Raw scores of ``TEXTS`` x ``TEXTS``: the engine's closed form, over the ids that the model's tokenizer gives."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    pairs = [(query, document) for query in TEXTS for document in TEXTS]
    ids = tokenizer([query for query, _ in pairs], [document for _, document in pairs])["input_ids"]
    sums = [sum(place * one for place, one in enumerate(each, 1)) for each in ids]
    return {pair: total % PRIME / PRIME * 8 - 4 for pair, total in zip(pairs, sums, strict=True)}
