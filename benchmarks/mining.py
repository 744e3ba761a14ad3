"""Benchmark of ``mine_hard_negatives`` with our service instead of a local ``CrossEncoder``.

The miner calls the cross-encoder once a query and waits for the scores before the next call.
``python -m benchmarks.loss --only mining`` runs this benchmark alone.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.report import Figure
from benchmarks.rounds import contest
from benchmarks.texts import Grid
from examples.processes import Child
from loss_client import RemoteCrossEncoder, RerankerClient

_DOCUMENTS = 64
_NEGATIVES = 3
_TOLERANCE = 0.005  # of probabilities
_SECONDS = {"minilm": 60.0, "tiny": 20.0}
_TARGET = {"minilm": 0.95, "tiny": None}
_TIMEOUT = 600.0


class MiningSide:
    """Side that runs ``mine_hard_negatives`` with one cross-encoder.

    A grid's queries are the anchors, its first documents their positives, and all its documents the corpus. The
    measured time is that of rescoring, from the first call of the cross-encoder to its last return; the rest of mining
    is the same for every side.

    Args:
        name: Name in the table.
        cross_encoder: Rescores the candidates, 32 a query, one query a call.
        embedder: Finds the candidates.
        embeddings: Directory for the cached embeddings.
        process: Server behind ``cross_encoder``, paused while another side has its turn; ``None`` for a local model.
    """

    def __init__(
        self,
        name: str,
        cross_encoder: Any,
        embedder: SentenceTransformer,
        embeddings: Path,
        process: Child | None = None,
    ) -> None:
        self.name = name
        self._timed = _Timed(cross_encoder)
        self._embedder = embedder
        self._embeddings = embeddings
        self._process = process

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """Mine; return the seconds of rescoring, and for each anchor the scores of its positive and its negatives."""
        self._timed.began = None
        mined = self._mine(grid)
        assert self._timed.began is not None
        return self._timed.ended - self._timed.began, np.array(mined["scores"][:], dtype=np.float32)

    def pause(self) -> None:
        """Stop the server's processes (SIGSTOP)."""
        if self._process is not None:
            self._process.pause()

    def resume(self) -> None:
        """Continue the server's processes (SIGCONT)."""
        if self._process is not None:
            self._process.resume()

    def _mine(self, grid: Grid) -> Dataset:
        pairs = {"anchor": list(grid.queries), "positive": list(grid.documents[: len(grid.queries)])}
        cross_encoder: Any = self._timed
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            return mine_hard_negatives(
                Dataset.from_dict(pairs),
                self._embedder,
                corpus=list(grid.documents),
                cross_encoder=cross_encoder,
                # No score is above 1, so nothing is filtered, and sides with equal scores keep the same negatives.
                max_score=1.0,
                num_negatives=_NEGATIVES,
                output_format="n-tuple",
                output_scores=True,
                verbose=False,
                cache_folder=str(self._embeddings),
            )


class _Timed:
    """Cross-encoder that records the start of the first call since ``began`` was reset to None, and the last end."""

    def __init__(self, cross_encoder: Any) -> None:
        self.began: float | None = None
        self.ended = 0.0
        self._cross_encoder = cross_encoder

    def predict(self, *arguments: Any, **options: Any) -> Any:
        if self.began is None:
            self.began = time.perf_counter()
        scores = self._cross_encoder.predict(*arguments, **options)
        self.ended = time.perf_counter()
        return scores


def mining_figures(bench: Bench) -> list[Figure]:
    """Measure the speed of mining through our service over that with a local ``CrossEncoder`` of the same weights."""
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory:
        embedder = SentenceTransformer(str(bench.models["all-minilm"]), local_files_only=True)
        return [figure for name in _SECONDS for figure in _compare(bench, name, embedder, Path(directory))]


def _compare(bench: Bench, name: str, embedder: SentenceTransformer, embeddings: Path) -> Iterator[Figure]:
    path = bench.models[name]
    local = CrossEncoder(str(path), local_files_only=True)
    if bench.launcher.machine.cuda:
        local.bfloat16()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(bench.launcher.server(path, "torch"))
        # Without remembered scores, because a client that remembers them would not send the pairs again.
        client = stack.enter_context(RerankerClient(address_of(server), timeout=_TIMEOUT, cache_pairs=0))
        sides = [
            MiningSide("service", RemoteCrossEncoder(client), embedder, embeddings, server),
            MiningSide("local", local, embedder, embeddings),
        ]
        found = contest(
            sides,
            lambda queries: bench.corpus.grid(queries, _DOCUMENTS),
            rounds=bench.rounds,
            seconds=_SECONDS[name] * bench.scale,
            tolerance=_TOLERANCE,
            say=bench.say,
        )
        server.resume()  # a stopped process could not end in order
    queries = f"{min(found.queries)} to {max(found.queries)}"
    bench.say(f"{queries} queries a round; scores of mined texts differ by at most {found.difference:.1e}")
    title = f"mine_hard_negatives, torch, {name}: service / local CrossEncoder"
    yield Figure(title, found.ratio("service", "local"), "x", _TARGET[name])
