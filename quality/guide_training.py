"""Training of a guide: settings and end that cross-encoder and tuned bi-encoder have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers.base.trainer import BaseTrainer
from transformers import PrinterCallback


def arguments(output: Path, batch_size: int, learning_rate: float) -> dict[str, Any]:
    """Return the training arguments of a guide: one epoch on the CPU with seed 0, a logged loss every 25 steps.

    Args:
        output: Directory of the model.
        batch_size: Rows of the data set in a batch.
        learning_rate: Peak learning rate.
    """
    return {
        "output_dir": str(output),
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_steps": 25,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }


def train(trainer: BaseTrainer, output: Path) -> list[float]:
    """Train a guide, save it in ``output``, and return the mean loss of every 25 steps."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.save_pretrained(str(output))
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
