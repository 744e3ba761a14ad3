"""What the server tells of its work while it runs; told to nobody unless somebody listens.

The other rooms call the methods of ``Metrics`` where a fact is known, and never ask for anything. ``Metrics`` itself
does nothing, at the price of a call for each reply or batch, never for each pair; ``PrometheusMetrics`` listens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from grpc import StatusCode

from reranker.v1 import reranker_pb2 as pb


@dataclass(frozen=True, slots=True)
class Load:
    """What waits and what is kept at one moment.

    Attributes:
        waiting: Sequences that have not entered the engine yet.
        oldest_seconds: How long the longest waiting job has been there; 0 if none waits.
        running: Sequences inside the engine.
        cache_bytes: Bytes that the cache takes up.
    """

    waiting: int = 0
    oldest_seconds: float = 0.0
    running: int = 0
    cache_bytes: int = 0


class Call:
    """One call of an RPC while it runs.

    Attributes:
        code: The status it ends with. CANCELLED until somebody says otherwise: a call that ends without a status of
            its own is one whose client has gone or whose deadline has passed.
    """

    __slots__ = ("code",)

    def __init__(self) -> None:
        self.code = StatusCode.CANCELLED


class Metrics:
    """Everything that can be told; here nobody listens."""

    def call(self, rpc: str) -> AbstractContextManager[Call]:
        """A call of ``rpc`` lasts as long as the context; set ``Call.code`` inside."""
        return nullcontext(Call())

    def reply(self, rpc: str, usage: pb.Usage) -> None:
        """Something was scored: a ranking, one request of a batch, or a chunk of a stream."""

    def refusal(self, rpc: str, code: StatusCode) -> None:
        """Something was not scored: a ranking, one request of a batch, or a chunk of a stream failed with ``code``."""

    def sent(self, seconds: float) -> None:
        """A reply went out ``seconds`` after its scores were known."""

    def encoded(self, seconds: float, texts: int) -> None:
        """``texts`` texts were tokenized in ``seconds``. May be called from any thread."""

    def batch(self, sequences: int, tokens: int) -> None:
        """A batch entered the engine."""

    def watch(self, read: Callable[[], Load]) -> None:
        """Call ``read`` whenever somebody looks.

        It is called from another thread than the server's: it must not walk through anything that may change meanwhile.
        """

    def serving(self, info: pb.GetModelInfoResponse) -> None:
        """The engine answers, with this model."""

    def engine_gone(self) -> None:
        """The engine answers no more."""
