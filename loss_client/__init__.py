"""A client of the reranker service, and a sentence-transformers loss that trains with it.

Importing this package needs neither torch nor sentence-transformers: names that need them are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loss_client.client.client import RerankerClient
from loss_client.client.errors import (
    ClientClosedError,
    FieldViolation,
    IncompatibleServerError,
    JobCancelledError,
    ModelChangedError,
    RerankerError,
    RerankerRequestError,
    RerankerTimeoutError,
    RerankerUnavailableError,
    ScoreError,
)
from loss_client.client.options import Priority
from loss_client.client.ranking import RankedDocument
from loss_client.client.scores import ScoreMatrix, ScoreType, ScoreUsage
from loss_client.client.turns import ServerState

if TYPE_CHECKING:
    from loss_client.callbacks import RerankerMarginCallback, RerankerMetricsCallback, RerankerResumeCallback
    from loss_client.collator import RerankerDataCollator
    from loss_client.cross_encoder import RemoteCrossEncoder
    from loss_client.filter.distillation import Distillation
    from loss_client.loss import RerankerCachedGISTEmbedLoss
    from loss_client.mining import mine_hard_negatives
    from loss_client.trainer import RerankerTrainer

_LAZY = {
    "Distillation": "loss_client.filter.distillation",
    "RemoteCrossEncoder": "loss_client.cross_encoder",
    "RerankerCachedGISTEmbedLoss": "loss_client.loss",
    "RerankerDataCollator": "loss_client.collator",
    "RerankerMarginCallback": "loss_client.callbacks",
    "RerankerMetricsCallback": "loss_client.callbacks",
    "RerankerResumeCallback": "loss_client.callbacks",
    "RerankerTrainer": "loss_client.trainer",
    "mine_hard_negatives": "loss_client.mining",
}

__all__ = [
    "ClientClosedError",
    "Distillation",
    "FieldViolation",
    "IncompatibleServerError",
    "JobCancelledError",
    "ModelChangedError",
    "Priority",
    "RankedDocument",
    "RemoteCrossEncoder",
    "RerankerCachedGISTEmbedLoss",
    "RerankerClient",
    "RerankerDataCollator",
    "RerankerError",
    "RerankerMarginCallback",
    "RerankerMetricsCallback",
    "RerankerRequestError",
    "RerankerResumeCallback",
    "RerankerTimeoutError",
    "RerankerTrainer",
    "RerankerUnavailableError",
    "ScoreError",
    "ScoreMatrix",
    "ScoreType",
    "ScoreUsage",
    "ServerState",
    "mine_hard_negatives",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        message = f"{name} needs the package {error.name}; install 'reranker-grpc[train]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
