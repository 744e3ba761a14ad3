"""Registry: the layout of each kind of model."""

from __future__ import annotations

from .bi_encoder import BiEncoderLayout
from .cross_encoder import CrossEncoderLayout
from .families import FAMILIES
from .layout import PairLayout, TextLayout
from .spec import ModelSpec, UnsupportedModelError
from .templated import TemplateLayout
from .tokenizer import load_tokenizer, plain_tokenizer


def make_layout(spec: ModelSpec) -> PairLayout | TextLayout:
    """Load a model's tokenizer and make the layout of its kind.

    Returns:
        A ``TextLayout`` for a bi-encoder, a ``PairLayout`` for all other kinds.

    Raises:
        UnsupportedModelError: The tokenizer can't be loaded, or does not give what the kind of model needs.
    """
    hub = load_tokenizer(spec.path, spec.trust_remote_code)
    plain = plain_tokenizer(spec, hub)
    if spec.library_input:
        # Imported late: the library takes seconds to import.
        from .library import library_layout

        return library_layout(spec, hub, plain)
    if spec.family is not None:
        return TemplateLayout(spec, hub, plain, FAMILIES[spec.family].template)
    if spec.kind == "bi-encoder":
        return BiEncoderLayout(spec, hub, plain)
    if spec.kind == "cross-encoder":
        layout = CrossEncoderLayout(spec, hub, plain)
        if not layout.has_separator:
            raise UnsupportedModelError(f"{spec.name}: its tokenizer puts no special token between query and document")
        return layout
    raise UnsupportedModelError(f"{spec.name}: a causal reranker needs a family or a chat template")
