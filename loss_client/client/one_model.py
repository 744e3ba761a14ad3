"""OneModel: a view of a client for one training step, whose jobs get all their scores from one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loss_client.client.scores import RawScale, ScoreMatrix


@dataclass(frozen=True, slots=True)
class OneModel:
    """Methods of a client that hold on to the model of the first score; see ``RerankerClient.one_model``.

    Attributes:
        stream_grid: ``RerankerClient.stream_grid``. Reading the scores may raise ``ModelChangedError``.
        stream_pairs: ``RerankerClient.stream_pairs``. Reading the scores may raise ``ModelChangedError``.
        raw_scale: ``RerankerClient.raw_scale``. Raises ``ModelChangedError`` if no server serves the model of the
            earlier scores any more.
    """

    stream_grid: Callable[..., ScoreMatrix]
    stream_pairs: Callable[..., ScoreMatrix]
    raw_scale: Callable[..., RawScale]
