"""Metrics: the events that the server's rooms report, in plain numbers and strings.

A room calls a method of ``Metrics`` where it knows a fact. ``Metrics`` itself discards all events;
``PrometheusMetrics`` counts them. The cost is one call for each reply or batch, never one for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Load:
    """Waiting and running work at one moment, and the memory that the cache and the work take up.

    Attributes:
        waiting: Sequences that have not entered the engine.
        oldest_seconds: Time that the oldest waiting job has waited; 0 if none waits.
        running: Sequences inside the engine.
        cache_bytes: Bytes that the cache takes up.
        held_bytes: Bytes that the server holds for its clients, of at most ``--memory-bytes``.
    """

    waiting: int = 0
    oldest_seconds: float = 0.0
    running: int = 0
    cache_bytes: int = 0
    held_bytes: int = 0


class ReplyUsage(Protocol):
    """Counts and times of one reply. ``reranker_service.scoring.Usage`` has them, and says what each one is."""

    pairs: int
    cached_pairs: int
    shared_pairs: int
    truncated_pairs: int
    tokens: int
    queue_seconds: float
    engine_seconds: float


class Call:
    """One call of an RPC while it runs.

    Attributes:
        code: Name of the status that the call ends with. CANCELLED until the servicer sets another one: a call that
            ends without a status was cancelled by its client or passed its deadline.
    """

    __slots__ = ("code",)

    def __init__(self) -> None:
        self.code = "CANCELLED"


class Metrics:
    """All events that can be reported; this class discards them."""

    def call(self, rpc: str) -> AbstractContextManager[Call]:
        """Report a call of ``rpc``, which lasts as long as the context; set ``Call.code`` inside."""
        return nullcontext(Call())

    def reply(self, rpc: str, usage: ReplyUsage) -> None:
        """Report a ranking, a request of a batch or a chunk of a stream that was scored."""

    def refusal(self, rpc: str, code: str) -> None:
        """Report a ranking, a request of a batch or a chunk of a stream that failed with the status ``code``."""

    def sent(self, seconds: float) -> None:
        """Report a reply that went out ``seconds`` after its last score was known."""

    def encoded(self, seconds: float, texts: int) -> None:
        """Report that ``texts`` texts were tokenized in ``seconds``. May be called from any thread."""

    def batch(self, sequences: int, tokens: int) -> None:
        """Report a batch that entered the engine."""

    def watch(self, read: Callable[[], Load]) -> None:
        """Give the function that reads the present load.

        It is called from another thread than the server's, so it must not iterate over anything that may change.
        """

    def serving(self, labels: Mapping[str, str]) -> None:
        """Report that the engine answers, with a model described by ``labels``."""

    def engine_gone(self) -> None:
        """Report that the engine has died."""
