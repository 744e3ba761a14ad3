"""Models: the description of a model, read from its own files, and the making of its input from texts.

This room knows no other room of the server. `spec` and `reading` describe a model, `hub` finds its files, and
`fingerprint` hashes everything that its scores depend on. `tokens` and `tokenizer` turn texts into token ids; each kind
of model has a layout that makes inputs of them. `families` has the templates of models whose files lack them, and
`library` asks sentence-transformers for the input of all models that the other files do not know.
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
