"""Models: what a model is, read from its own files, and how texts become its input.

This room knows no other room of the server. `spec` and `reading` describe a model, `hub` finds its files, `fingerprint`
names everything that its scores depend on. `tokens`, `tokenizer` and one layout a kind of model make token sequences.
"""

from .fingerprint import fingerprint
from .layout import Layout, NoRoomError, PairLayout, TextLayout
from .reading import read_model
from .registry import make_layout
from .spec import ModelKind, ModelSpec, Pooling, UnsupportedModelError
from .tokens import EncodedText, TokenSequence

__all__ = [
    "EncodedText",
    "Layout",
    "ModelKind",
    "ModelSpec",
    "NoRoomError",
    "PairLayout",
    "Pooling",
    "TextLayout",
    "TokenSequence",
    "UnsupportedModelError",
    "fingerprint",
    "make_layout",
    "read_model",
]
