"""Benchmark of prefetch: time of a training step over the longer of training alone and scoring alone.

A server with an engine of fixed speed scores the pairs of real training over gRPC. Its rate is set so that scoring a
batch takes a given multiple (the "ratio") of a training step. "Training alone" is the same training without a reranker,
with ``CachedMultipleNegativesRankingLoss``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, NullLocator
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.loss_pace import RATE_FILE, write_rate
from benchmarks.report import Figure, save_svg
from benchmarks.rounds import Spread
from loss_client import RerankerCachedGISTEmbedLoss, RerankerClient, RerankerDataCollator
from loss_client.filter.jobs import ScoringClient

Mode = Literal["alone", "prefetch", "no prefetch"]

RATIOS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
_QUICK_RATIOS = (0.5, 2.0)
TARGET = 1.05
# The first step cannot prefetch. Both numbers are even, because the jobs of two batches can share the server, and then
# a long step and a short one alternate.
_SKIPPED_STEPS = 2
_STEPS = 4
# Small sizes make steps short; the figures depend on the ratio, not on the model.
_LAYERS = 1
_TOKENS = 32
_MINI_BATCH = 16
_CHUNK_PAIRS = 64
_FASTEST = 1e9
_TIMEOUT = 600.0
_RATE = "rate"  # name of the file with the server's rate


@dataclass(frozen=True, slots=True)
class Steps:
    """Mean times of the steps of one training.

    Attributes:
        seconds: Seconds of a step.
        embedding: Seconds of the part of a step that embeds the batch without gradients. The loss needs the first
            score at its end.
    """

    seconds: float
    embedding: float


@dataclass(frozen=True, slots=True)
class Round:
    """Measurements for one ratio in one round, taken one right after the other.

    Attributes:
        alone: Training without a reranker.
        score: Seconds to score one batch while no training runs.
        prefetch: Seconds of a step with scores requested a batch ahead.
        without: Seconds of a step with scores requested when the step begins.
    """

    alone: Steps
    score: float
    prefetch: float
    without: float

    @property
    def bound(self) -> float:
        """Lower bound of the mean step time, in seconds, of a training that needs all these scores."""
        return max(self.alone.seconds, self.score)

    @property
    def predicted(self) -> float:
        """Expected seconds of a step without prefetch, in which scoring overlaps with the embedding pass alone."""
        return self.alone.seconds + max(0.0, self.score - self.alone.embedding)


class StepClock(TrainerCallback):
    """Measures the steps and embedding passes of one training.

    Args:
        skipped: Number of first steps to leave out.
        clock: Returns the time in seconds.
    """

    def __init__(self, skipped: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._skipped = skipped
        self._clock = clock
        self._ends: list[float] = []
        self._embedding: list[float] = []

    def watch(self, loss: nn.Module) -> None:
        """Measure, for each forward pass of a cached loss, the time until it has all embeddings."""
        forward, calculate = loss.forward, loss.calculate_loss
        began = 0.0

        def timed_forward(*arguments: Any, **options: Any) -> Any:
            nonlocal began
            began = self._clock()
            return forward(*arguments, **options)

        def timed_calculate(*arguments: Any, **options: Any) -> Any:
            self._embedding.append(self._clock() - began)
            return calculate(*arguments, **options)  # type: ignore[operator]

        loss.forward = timed_forward
        loss.calculate_loss = timed_calculate  # type: ignore[assignment]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the end of a step."""
        self._ends.append(self._clock())

    def steps(self) -> Steps:
        """Return the means over the counted steps. At least one step must have been skipped and one counted."""
        first, last = self._ends[self._skipped - 1], self._ends[-1]
        counted = self._embedding[self._skipped :]
        return Steps((last - first) / (len(self._ends) - self._skipped), sum(counted) / len(counted))


@dataclass(slots=True)
class Training:
    """Trains one small model repeatedly on the same batches, with scores of a server of fixed speed.

    Attributes:
        model: The model.
        client: Client of the server.
        queries: The anchors of all batches.
        documents: The positives of all batches.
        batch: Number of anchors of a batch.
        directory: Directory for the trainer's output and the file with the server's rate.
    """

    model: SentenceTransformer
    client: RerankerClient
    queries: Sequence[str]
    documents: Sequence[str]
    batch: int
    directory: Path

    def set_rate(self, pairs_a_second: float) -> None:
        """Set the speed of the server."""
        write_rate(self.directory / _RATE, pairs_a_second)

    def score_seconds(self) -> float:
        """Return the seconds in which the server scores the first batch, while no training runs."""
        began = time.perf_counter()
        queries, documents = self.queries[: self.batch], self.documents[: self.batch]
        self.client.stream_grid(queries, documents, chunk_pairs=_CHUNK_PAIRS, timeout=_TIMEOUT).result()
        return time.perf_counter() - began

    def run(
        self,
        mode: Mode,
        steps: int,
        skipped: int = _SKIPPED_STEPS,
        accumulation: int = 1,
        client: ScoringClient | None = None,
        gather: bool = False,
    ) -> Steps:
        """Train on the first batches.

        Args:
            mode: Kind of training.
            steps: Number of steps that are measured.
            skipped: Number of steps before these.
            accumulation: Batches of a step.
            client: Client to use instead of the training's own.
            gather: Whether each rank's anchors have the documents of all ranks.
        """
        arguments = SentenceTransformerTrainingArguments(
            str(self.directory),
            max_steps=skipped + steps,
            per_device_train_batch_size=self.batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",  # AdamW's update of the embedding table would take longer than the small model itself
            learning_rate=1e-6,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        loss: Any
        collator: RerankerDataCollator | None = None
        if mode == "alone":
            loss = CachedMultipleNegativesRankingLoss(
                self.model, mini_batch_size=_MINI_BATCH, gather_across_devices=gather
            )
        else:
            loss = RerankerCachedGISTEmbedLoss(
                self.model,
                client or self.client,
                0.05,
                _MINI_BATCH,
                chunk_pairs=_CHUNK_PAIRS,
                timeout=_TIMEOUT,
                gather_across_devices=gather,
            )
            ahead = loss if mode == "prefetch" else None
            collator = RerankerDataCollator.for_training(self.model, arguments, ahead)
        clock = StepClock(skipped)
        clock.watch(loss)
        dataset = Dataset.from_dict({"anchor": list(self.queries), "positive": list(self.documents)})
        trainer = SentenceTransformerTrainer(
            self.model, arguments, dataset, loss=loss, data_collator=collator, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.steps()


@contextmanager
def training_beside_server(bench: Bench, batch: int, batches: int) -> Iterator[Training]:
    """Start a server of fixed speed, and leave one core to it and to the client.

    Args:
        bench: The run.
        batch: Number of anchors of a batch.
        batches: Number of batches.
    """
    texts = bench.corpus.grid(batch * batches, batch * batches)
    model = small_student()
    with one_core_left(bench), tempfile.TemporaryDirectory(prefix="reranker-bench-") as directory:
        with paced_server(bench, Path(directory)) as address, RerankerClient(address, timeout=_TIMEOUT) as client:
            yield Training(model, client, texts.queries, texts.documents, batch, Path(directory))


@contextmanager
def paced_server(bench: Bench, directory: Path) -> Iterator[str]:
    """Start a server whose speed a ``Training`` of the same directory sets; yield its address."""
    rate = directory / _RATE
    write_rate(rate, _FASTEST)
    with bench.launcher.server(
        bench.models["tiny"], "torch", module="benchmarks.loss_pace", **{RATE_FILE: str(rate)}
    ) as server:
        yield address_of(server)


def small_student() -> SentenceTransformer:
    """Load the model that is trained: one layer, short texts."""
    # Imported here: the benchmark on a GPU uses this file's clock without the package of the student's weights.
    from examples.student import load_student

    model = load_student(_LAYERS)
    model.max_seq_length = _TOKENS
    return model


def prefetch_figures(bench: Bench, plot: Path) -> list[Figure]:
    """Measure step times with and without prefetch for each ratio, over the bound and the prediction.

    Args:
        bench: The run.
        plot: File for the plot, SVG.
    """
    quick = bench.scale < 1
    batch, steps, ratios = (8, 2, _QUICK_RATIOS) if quick else (24, _STEPS, RATIOS)
    found: dict[float, list[Round]] = {ratio: [] for ratio in ratios}
    accuracy: list[float] = []
    # One batch more than the steps need, so that the last step also has a next batch to prefetch.
    with training_beside_server(bench, batch, _SKIPPED_STEPS + steps + 1) as training:
        for mode in ("prefetch", "alone"):  # the first training is a warm-up
            usual = training.run(mode, steps).seconds
        for number in range(bench.rounds):
            for ratio in ratios:
                alone = training.run("alone", steps)
                nominal = ratio * usual
                training.set_rate(batch * batch / nominal)
                score = training.score_seconds()
                accuracy.append(score / nominal)
                prefetch, without = (training.run(mode, steps).seconds for mode in ("prefetch", "no prefetch"))
                one = Round(alone, score, prefetch, without)
                found[ratio].append(one)
                bench.say(
                    f"round {number + 1}, ratio {ratio}: train {alone.seconds:.3f} s (embedding "
                    f"{alone.embedding:.3f} s), score {score:.3f} s; step {prefetch:.3f} s with prefetch, "
                    f"{without:.3f} s without ({one.predicted:.3f} s predicted)"
                )
    draw(plot, found)
    return list(figures(found, accuracy))


def figures(found: Mapping[float, Sequence[Round]], accuracy: Sequence[float]) -> Iterator[Figure]:
    """Yield the figures.

    Args:
        found: All rounds of each ratio.
        accuracy: Measured / intended seconds of scoring alone, one value a round and ratio.
    """
    for ratio, rounds in found.items():
        shares = Spread.of([one.prefetch / one.bound for one in rounds])
        yield Figure(f"prefetch, score/train {ratio:g}: step / max(train, score)", shares, "x", TARGET, False)
    for ratio, rounds in found.items():
        shares = Spread.of([one.without / one.predicted for one in rounds])
        yield Figure(f"no prefetch, score/train {ratio:g}: step / predicted", shares, "x", TARGET, False)
    for ratio, rounds in found.items():
        gain = Spread.of([one.without / one.prefetch for one in rounds])
        yield Figure(f"score/train {ratio:g}: step without / with prefetch", gain)
    every = [one for rounds in found.values() for one in rounds]
    yield Figure("train alone: step", Spread.of([one.alone.seconds for one in every]), "s", None, False)
    yield Figure(
        "train alone: embedding pass / step",
        Spread.of([one.alone.embedding / one.alone.seconds for one in every]),
        higher_is_better=False,
    )
    yield Figure("score alone: measured / intended", Spread.of(accuracy), higher_is_better=False)


@contextmanager
def one_core_left(bench: Bench) -> Iterator[None]:
    """Leave one core to client and server, because a reranker on another machine would take none from training."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, len(bench.launcher.machine.cores) - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(path: Path, found: Mapping[float, Sequence[Round]]) -> None:
    """Plot step time / bound over the ratio as SVG, measured and predicted, with and without prefetch."""
    ratios = sorted(found)
    every = [one for rounds in found.values() for one in rounds]
    share = Spread.of([one.alone.embedding / one.alone.seconds for one in every]).value
    canvas = Canvas(figsize=(7, 4), layout="constrained")
    axes = canvas.subplots()
    axes.set_xscale("log", base=2)
    curve = [ratios[0] * (ratios[-1] / ratios[0]) ** (place / 200) for place in range(201)]
    predicted = [(1 + max(0.0, ratio - share)) / max(1.0, ratio) for ratio in curve]
    axes.plot(curve, predicted, color="tab:red", linestyle="--", linewidth=1, label="without prefetch, predicted")
    axes.axhline(1.0, color="tab:green", linestyle="--", linewidth=1, label="with prefetch, predicted")
    for name, color, shares in (
        ("without prefetch", "tab:red", {ratio: [one.without / one.bound for one in found[ratio]] for ratio in ratios}),
        ("with prefetch", "tab:green", {ratio: [one.prefetch / one.bound for one in found[ratio]] for ratio in ratios}),
    ):
        spreads = [Spread.of(shares[ratio]) for ratio in ratios]
        values = [spread.value for spread in spreads]
        errors = [
            [spread.value - spread.low for spread in spreads],
            [spread.high - spread.value for spread in spreads],
        ]
        axes.errorbar(ratios, values, errors, fmt="o", markersize=4, capsize=2, color=color, label=name)
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0.9, None)
    axes.set_xlabel("time to score a batch / time to train on it")
    axes.set_ylabel("step / the longer of both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_svg(canvas, path)
