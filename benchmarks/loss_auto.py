"""Benchmark of ``per_anchor="auto"``: time of a training step over the longer of training and own documents' scores.

The reranker is a client in this process that computes nothing: its scores arrive at a fixed rate, one job after the
other, as from a GPU on another machine. The preselector's embeddings are random numbers, because only times count. The
time of training is that of the same steps without their waiting, so that other work on the machine affects both sides.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.bench import Bench
from benchmarks.report import Figure
from benchmarks.rounds import Spread
from loss_client import RerankerCachedGISTEmbedLoss, RerankerTrainer
from loss_client.client.scores import RawScale, ScoreUsage

RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Seconds that the reranker needs for all pairs of a batch, over those of a step."""
_QUICK_RATIOS = (4.0, 64.0)
_TARGET = 1.05
_SKIPPED_STEPS = 4  # the first one cannot prefetch, and the number of pairs has to settle
_STEPS = 12
_FASTEST = 1e9
_TOKENS = 32


class RatedScores:
    """Implements ``ScoreRows``: a list of pairs whose scores, all 0, arrive one after the other."""

    error = None

    def __init__(self, server: RatedReranker, pairs: int) -> None:
        self.shape = (pairs, 1)
        self.wait_seconds = 0.0
        self.done = 0.0  # pairs with a score
        self.ended: float | None = None
        self._server = server
        self._begun = time.monotonic()

    @property
    def usage(self) -> ScoreUsage:
        """See ``ScoreRows``."""
        self._server.advance()
        return ScoreUsage(pairs=int(self.done))

    @property
    def span(self) -> tuple[float, float]:
        """See ``ScoreRows``."""
        return self._begun, self.ended or time.monotonic()

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """See ``ScoreRows``."""
        return self.arrived(begin, end, float("inf"))

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        """See ``ScoreRows``."""
        started = time.monotonic()
        while (missing := self._server.seconds_until(self, end)) > 0:
            left = timeout - (time.monotonic() - started)
            if left <= 0:
                break
            time.sleep(min(missing, left))
        self.wait_seconds += time.monotonic() - started
        found = np.zeros((end - begin, 1), dtype=np.float32)
        found[max(0, int(self.done) - begin) :] = np.nan
        return found

    def release(self, begin: int, end: int) -> None:
        """Do nothing: no scores are kept."""

    def cancel(self) -> None:
        """Take the job from the reranker's queue."""
        self._server.drop(self)


class RatedReranker:
    """Implements ``ScoringClient``: a reranker of a fixed speed that scores its jobs one after the other.

    Attributes:
        rate: Pairs a second.
    """

    def __init__(self) -> None:
        self.rate = _FASTEST
        self._jobs: list[RatedScores] = []
        self._last = time.monotonic()
        self._lock = threading.RLock()

    def raw_scale(self, timeout: float | None) -> RawScale:
        """See ``ScoringClient``."""
        return "cosine"

    def stream_grid(self, queries: Sequence[str], documents: Sequence[str], **options: Any) -> RatedScores:
        """Refuse: only lists of pairs are measured."""
        raise NotImplementedError

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        **options: Any,
    ) -> RatedScores:
        """See ``ScoringClient``."""
        with self._lock:
            self.advance()
            job = RatedScores(self, len(query_ids))
            self._jobs.append(job)
            return job

    def advance(self) -> None:
        """Score the pairs whose time has come."""
        with self._lock:
            at, now = self._last, time.monotonic()
            self._last = now
            while self._jobs and at < now:
                job = self._jobs[0]
                at += (job.shape[0] - job.done) / self.rate
                if at > now:
                    job.done = job.shape[0] - (at - now) * self.rate
                else:
                    job.done, job.ended = job.shape[0], at
                    self._jobs.pop(0)

    def seconds_until(self, job: RatedScores, pairs: int) -> float:
        """Return the seconds until the first ``pairs`` of a job have scores, if no job is dropped; 0 if they have."""
        with self._lock:
            self.advance()
            if job.done >= pairs or job not in self._jobs:
                return 0.0
            before = self._jobs[: self._jobs.index(job)]
            return (pairs - job.done + sum(other.shape[0] - other.done for other in before)) / self.rate

    def drop(self, job: RatedScores) -> None:
        """Score no more of a job."""
        with self._lock:
            self.advance()
            if job in self._jobs:
                self._jobs.remove(job)
                job.ended = time.monotonic()


class _Steps(TrainerCallback):
    """Records the time and the waiting of each step."""

    def __init__(self, loss: RerankerCachedGISTEmbedLoss) -> None:
        self._loss = loss
        self._ends: list[tuple[float, float]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ends.append((time.monotonic(), self._loss.statistics.wait_seconds))

    def measured(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (seconds, seconds waited) of the counted steps, each of shape ``(steps,)``."""
        seconds, waited = np.diff(np.array(self._ends), axis=0)[_SKIPPED_STEPS - 1 :].T
        return seconds, waited


def auto_figures(bench: Bench) -> list[Figure]:
    """Measure step times with rerankers of several speeds."""
    from examples.student import load_student  # imported late, as in ``loss_prefetch``

    quick = bench.scale < 1
    batch, steps = (8, 3) if quick else (32, _STEPS)
    model = load_student(1)
    model.max_seq_length = _TOKENS
    rows = batch * (_SKIPPED_STEPS + steps + 1)
    texts = bench.corpus.grid(rows, rows)
    dataset = Dataset.from_dict({"anchor": list(texts.queries), "positive": list(texts.documents)})
    server = RatedReranker()
    _train(model, server, dataset, batch, steps)  # a warm-up
    usual = float(_train(model, server, dataset, batch, steps)[0].mean())
    figures = []
    for ratio in _QUICK_RATIOS if quick else RATIOS:
        found, numbers = [], []
        for _ in range(bench.rounds):
            server.rate = batch * batch / (ratio * usual)
            seconds, waited, per_anchor = _train(model, server, dataset, batch, steps)
            found.append(float(seconds.sum() / np.maximum(seconds - waited, batch / server.rate).sum()))
            numbers.append(per_anchor)
        name = f"auto, score all/train {ratio:g}"
        figures.append(Figure(f"{name}: step / max(train, own documents)", Spread.of(found), "x", _TARGET, False))
        figures.append(Figure(f"{name}: preselected pairs", Spread.of(numbers), "an anchor"))
        bench.say(f"{name}: step {found[-1]:.3f} of the bound, {numbers[-1]:.1f} preselected pairs an anchor")
    return figures


def _train(
    model: SentenceTransformer, server: RatedReranker, dataset: Dataset, batch: int, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Train; return (seconds, seconds waited) of the counted steps, and the mean preselected pairs of an anchor."""
    loss = RerankerCachedGISTEmbedLoss(
        model, server, 0.05, 16, score_type="raw", candidates="nearest", preselector=_embed
    )
    clock = _Steps(loss)
    with tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory:
        arguments = SentenceTransformerTrainingArguments(
            directory,
            max_steps=_SKIPPED_STEPS + steps,
            per_device_train_batch_size=batch,
            optim="sgd",
            learning_rate=1e-6,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = RerankerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return *clock.measured(), loss.statistics.preselected_pairs / loss.statistics.anchors


def _embed(texts: list[str]) -> NDArray[np.float64]:
    """Embed texts at random, equal texts alike."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])
