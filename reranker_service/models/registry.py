"""Registry: the layout of each kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .bi_encoder import BiEncoderLayout
from .causal import CausalLayout
from .cross_encoder import CrossEncoderLayout
from .layout import PairLayout, TextLayout
from .spec import ModelKind, ModelSpec
from .tokenizer import load_tokenizer, plain_tokenizer

_LAYOUTS: Mapping[ModelKind, Callable[..., Any]] = {
    "cross-encoder": CrossEncoderLayout,
    "causal-reranker": CausalLayout,
    "bi-encoder": BiEncoderLayout,
}


def make_layout(spec: ModelSpec) -> PairLayout | TextLayout:
    """Load a model's tokenizer and make the layout of its kind.

    Returns:
        A ``TextLayout`` for a bi-encoder, a ``PairLayout`` for all other kinds.

    Raises:
        UnsupportedModelError: The tokenizer can't be loaded, or does not give what the kind of model needs.
    """
    tokenizer = load_tokenizer(spec.path)
    layout: PairLayout | TextLayout = _LAYOUTS[spec.kind](spec, tokenizer, plain_tokenizer(spec, tokenizer))
    return layout
