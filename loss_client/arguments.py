"""Arguments of the loss: their checks, and the model card's settings of loss and reranker."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args

from loss_client.client.scores import ScoreType
from loss_client.filter.candidates import Candidates
from loss_client.filter.contrast import HardnessMode
from loss_client.filter.masking import MarginStrategy
from loss_client.filter.step import ContrastFilter, OnError

logger = logging.getLogger(__name__)

MODEL_INFO_SECONDS = 5.0
"""Longest time to wait for the reranker's name and fingerprint."""

CITATION = """
@misc{solatorio2024gistembed,
    title={GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author={Aivin V. Solatorio},
    year={2024},
    eprint={2402.16829},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
"""BibTeX entries of the papers that the loss builds on."""

_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "margin_strategy": get_args(MarginStrategy),
    "score_type": get_args(ScoreType),
    "contrast_filter": get_args(ContrastFilter),
    "candidates": get_args(Candidates),
    "on_error": get_args(OnError),
    "hardness_mode": (None, *get_args(HardnessMode)),
}
_POSITIVE = (
    "max_candidates",
    "temperature",
    "mini_batch_size",
    "mini_batch_num_tokens",
    "chunk_pairs",
    "reranker_max_length",
    "timeout",
    "max_wait",
)
_IN_CARD = (
    "temperature",
    "mini_batch_size",
    "mini_batch_num_tokens",
    "margin_strategy",
    "margin",
    "chunk_pairs",
    "instruction",
    "reranker_max_length",
    "score_type",
    "contrast_anchors",
    "contrast_positives",
    "contrast_filter",
    "gather_across_devices",
    "candidates",
    "top_p",
    "max_candidates",
    "per_anchor",
    "max_wait",
    "on_error",
    "distillation",
    "hardness_mode",
    "hardness_strength",
)


P = ParamSpec("P")
T = TypeVar("T")


def accept_mass(function: Callable[P, T]) -> Callable[P, T]:
    """Accept the former mode ``candidates="mass"`` and the former argument ``epsilon``, with a ``DeprecationWarning``.

    To be used below ``accept_former_names``, whose caller the warnings name.

    The mode is ``candidates="nearest"`` with ``top_p``, 0.999 by default; ``epsilon`` is ``1 - top_p``.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        epsilon: Any = kwargs.pop("epsilon", None)
        if epsilon is not None:
            if kwargs.get("top_p") is not None:
                raise TypeError("top_p is given twice, also as epsilon, which is 1 - top_p.")
            warnings.warn(
                f"epsilon is now 1 - top_p: write top_p={1 - epsilon:.12g}.", DeprecationWarning, stacklevel=3
            )
            kwargs["top_p"] = 1 - epsilon
        if kwargs.get("candidates") == "mass":
            if kwargs.get("top_p") is None:
                kwargs["top_p"] = 0.999
            warnings.warn(
                f"candidates='mass' is now candidates='nearest' with top_p={kwargs['top_p']:.12g}.",
                DeprecationWarning,
                stacklevel=3,
            )
            kwargs["candidates"] = "nearest"
        return function(*args, **kwargs)

    return call


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``RerankerCachedGISTEmbedLoss``; ``arguments`` has them by name, with others.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, choices in _CHOICES.items():
        if arguments[name] not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {arguments[name]!r}.")
    check_margin(arguments["margin"], arguments["margin_strategy"], arguments["score_type"])
    if arguments["top_p"] is not None and not 0 < arguments["top_p"] < 1:
        raise ValueError(f"top_p must be between 0 and 1, such as 0.999, not {arguments['top_p']!r}.")
    per_anchor = arguments["per_anchor"]
    if per_anchor != "auto" and not (isinstance(per_anchor, (int, float)) and per_anchor > 0):
        raise ValueError(f"per_anchor must be 'auto' or greater than 0, not {per_anchor!r}.")
    if arguments["candidates"] == "nearest" and arguments["preselector"] is None and arguments["top_p"] is None:
        raise ValueError(
            "candidates='nearest' needs a preselector, a fast model that tells which documents are near an anchor: the "
            "address of a served bi-encoder, or a small SentenceTransformer, such as "
            "preselector=SentenceTransformer('sentence-transformers/all-MiniLM-L6-v2'). Without a preselector, give "
            "top_p, such as top_p=0.999, which chooses by the similarities of the trained model."
        )
    for name in _POSITIVE:
        if arguments[name] is not None and not arguments[name] > 0:
            raise ValueError(f"{name} must be greater than 0, not {arguments[name]!r}.")
    mode, strength = arguments["hardness_mode"], arguments["hardness_strength"]
    if not 0 <= strength < math.inf:
        raise ValueError(f"hardness_strength must be a finite number, 0 or more, not {strength!r}.")
    if mode is not None and not strength:
        logger.warning(
            "hardness_mode=%r has no effect with hardness_strength=0.0. Set a hardness_strength above 0.", mode
        )


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


def in_card(loss: object) -> dict[str, Any]:
    """Return the settings of a loss for the model card, by name."""
    settings = {name: getattr(loss, name) for name in _IN_CARD}
    distillation = settings["distillation"]
    return {**settings, "distillation": None if distillation is None else asdict(distillation)}


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
