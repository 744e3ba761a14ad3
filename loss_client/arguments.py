"""Checks of the loss's arguments, their former names, and the reranker's description for the model card."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from loss_client.client.scores import ScoreType
from loss_client.filter.masking import MarginStrategy

logger = logging.getLogger(__name__)

MODEL_INFO_SECONDS = 5.0
"""Longest time to wait for the reranker's name and fingerprint."""

P = ParamSpec("P")
T = TypeVar("T")


def accept_former_names(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a decorator that accepts keyword arguments under their former names, with a ``DeprecationWarning``.

    The decorated function raises ``TypeError`` for a call that gives an argument under both names.

    Args:
        **names: The present name of each argument by its former name.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for former in kwargs.keys() & names.keys():
                present = names[former]
                if present in kwargs:
                    raise TypeError(f"{present} is given twice, also under its former name {former}.")
                warnings.warn(f"{former} is now named {present}.", DeprecationWarning, stacklevel=2)
                kwargs[present] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorate


def check_margin(margin: float, strategy: MarginStrategy, score_type: ScoreType) -> None:
    """Raise ``ValueError`` for a margin that masks every negative, or none, whatever the scores are.

    Args:
        margin: The margin, in units of the score (absolute) or as a share of the positive's score (relative).
        strategy: How the margin is applied; see :func:`thresholds`.
        score_type: ``"probability"`` for scores in [0, 1], ``"raw"`` for scores without known bounds.
    """
    if not math.isfinite(margin):
        raise ValueError(f"margin must be a finite number, not {margin!r}.")
    if score_type != "probability":
        return
    if margin >= 1:
        raise ValueError(
            f"A margin of {margin} with margin_strategy={strategy!r} masks every negative, because scores are "
            "probabilities in [0, 1]. Use a margin below 1, or score_type='raw'."
        )
    if strategy == "absolute" and margin <= -1:
        raise ValueError(
            f"A margin of {margin} with margin_strategy='absolute' masks no negative, because scores are probabilities "
            "in [0, 1]. Use a margin above -1, or score_type='raw'."
        )


def describe_reranker(client: object) -> dict[str, str] | None:
    """Ask a client for the name and the fingerprint of the reranker's model, for the model card.

    Takes at most ``MODEL_INFO_SECONDS``. Returns ``None`` if the client has no ``model_info`` or the call fails.
    """
    model_info = getattr(client, "model_info", None)
    if model_info is None:
        return None
    try:
        info = model_info(timeout=MODEL_INFO_SECONDS)
        return {"model": info.model, "fingerprint": info.fingerprint}
    except Exception as error:  # of any class: a missing line of the model card must not end the training
        logger.warning("The model card will not name the reranker's model, because it could not be asked: %s", error)
        return None


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raise ``ValueError`` unless the argument ``name`` has one of the values in ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}.")


def check_positive(**values: float | None) -> None:
    """Raise ``ValueError`` for an argument that is neither ``None`` nor greater than 0."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be greater than 0, not {value!r}.")


def check_not_negative(**values: float | None) -> None:
    """Raise ``ValueError`` for an argument that is neither ``None`` nor a finite number of 0 or more."""
    for name, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number, 0 or more, not {value!r}.")
