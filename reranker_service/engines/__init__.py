"""Engines: compute one number or one vector for each token sequence.

`base` is the protocol, `torch_engine` and `vllm_engine` implement it.
"""

from ..models import TokenSequence
from .base import Engine, EngineDeadError
from .checks import EngineMemoryError, NonFiniteScoreError, PartialResultError, WrongResultError, one_each

__all__ = [
    "Engine",
    "EngineDeadError",
    "EngineMemoryError",
    "NonFiniteScoreError",
    "PartialResultError",
    "TokenSequence",
    "WrongResultError",
    "one_each",
]
