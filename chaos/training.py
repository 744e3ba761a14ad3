"""Fault: servers that are killed while a model trains; its weights must come out as without faults, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, set_seed

from chaos.ledger import Ledger
from chaos.run import STALL_SECONDS, TIMEOUT_SECONDS, Run
from chaos.scores import raw_scores_of_texts, texts_of
from chaos.servers import Server
from loss_client import Distillation, RerankerCachedGISTEmbedLoss, RerankerClient, RerankerTrainer
from loss_client.client.errors import JobCancelledError
from loss_client.client.scores import ScoreMatrix
from tests.training import student

_ROWS = 24  # of a batch
# Pairs a second without faults, and with faults: then a step waits for its scores.
_FAST, _SLOW = 100_000.0, 8_000.0
_COLUMNS = ("anchor", "positive", "negative")
_FIRST_NUMBER = 900_000_000
# Every second kill finds the server without a job.
_KILLS_FOR_ONE = 2


def killed_in_training(run: Run) -> None:
    """Train a model without faults, and again while servers are killed, and compare the weights."""
    reference = Run(run.sizes, run.model, run.directory)
    with reference.serving(1, rate=_FAST) as servers:
        expected = _train(run.sizes.steps, run.directory, servers, reference.ledger)
    run.ledger.errors += reference.ledger.errors
    with run.serving(2, rate=_SLOW) as servers:
        every = max(1, run.sizes.steps // (_KILLS_FOR_ONE * run.sizes.times + 1))
        killer = _Killer(servers, every)
        found = _train(run.sizes.steps, run.directory, servers, run.ledger, [killer])
        for server in servers:
            server.wait_ready()
    run.injections.done = killer.kills
    other = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    if other or expected.keys() != found.keys():
        run.ledger.error(f"training ended with other weights: {', '.join(other)}")


class _Killer(TrainerCallback):
    """Kills one of the servers every few steps, while the scores of the next batch are being computed.

    Attributes:
        kills: Servers that were killed so far.
    """

    def __init__(self, servers: Sequence[Server], every: int) -> None:
        self.kills = 0
        self._servers, self._every = servers, every

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Kill a server and start it again, without waiting for it."""
        if state.global_step % self._every == self._every - 1:
            server = SystemRandom().choice(self._servers)
            server.end(signal.SIGKILL)
            server.start()
            self.kills += 1


class _RecordingClient(RerankerClient):
    """A client that keeps its jobs.

    Attributes:
        jobs: Matrix, queries and documents of each job.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.jobs: list[tuple[ScoreMatrix, list[str], list[str]]] = []

    def stream_grid(self, queries: Sequence[str], documents: Sequence[str], **options: Any) -> ScoreMatrix:
        """Begin a job; see the base class."""
        matrix = super().stream_grid(queries, documents, **options)
        self.jobs.append((matrix, list(queries), list(documents)))
        return matrix


def _train(
    steps: int, directory: Path, servers: Sequence[Server], ledger: Ledger, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Tensor]:
    """Train a new model; equal steps give equal weights."""
    set_seed(0)
    model = student(directory)
    addresses = [server.address for server in servers]
    with _RecordingClient(addresses, timeout=TIMEOUT_SECONDS, stall_timeout=STALL_SECONDS) as client:
        loss = RerankerCachedGISTEmbedLoss(
            model, client, temperature=0.05, mini_batch_size=_ROWS, margin=0.05, distillation=Distillation()
        )
        arguments = SentenceTransformerTrainingArguments(
            str(directory / "training"),
            max_steps=steps,
            per_device_train_batch_size=_ROWS,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = RerankerTrainer(
            model=model, args=arguments, train_dataset=_dataset(steps), loss=loss, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        for matrix, queries, documents in client.jobs:
            if isinstance(matrix.error, JobCancelledError):
                continue  # begun ahead for a step that did not come
            ledger.job(matrix, raw_scores_of_texts(queries, documents, seed=0))
    return {name: value.clone() for name, value in model.state_dict().items()}


def _dataset(steps: int) -> Dataset:
    """Return texts of numbers for so many steps; no text comes twice, so that no cache answers."""
    numbers = np.arange(_FIRST_NUMBER, _FIRST_NUMBER + len(_COLUMNS) * _ROWS * steps).reshape(len(_COLUMNS), -1)
    return Dataset.from_dict({name: texts_of(column) for name, column in zip(_COLUMNS, numbers, strict=True)})
