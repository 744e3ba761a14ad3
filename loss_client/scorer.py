"""The loss's hold on a client: made when first needed, closed with the loss, and never copied."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from loss_client.scores import ScoreType
from loss_client.step import ScoreRows


@runtime_checkable
class GridClient(Protocol):
    """What the loss needs of a client; ``RerankerClient`` is one."""

    def stream_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        instruction: str | None,
        max_length: int | None,
        score_type: ScoreType,
        chunk_pairs: int,
        timeout: float | None,
    ) -> ScoreRows:
        """Begin to score every query with every document; returns at once."""


class SharedClient:
    """A client by address, opened at first use, or one that the caller owns.

    A client holds a thread and sockets, so that copies and pickles of a loss must not take it along: a copy opens its
    own by the same address. A client that the caller owns is shared by copies in the same process; whether it can be
    pickled is its own affair.

    Args:
        source: An address, several, or a client.

    Raises:
        TypeError: ``source`` is none of these.
        ValueError: No address at all.
    """

    def __init__(self, source: str | Sequence[str] | GridClient) -> None:
        self._targets: list[str] | None = None
        self._client: GridClient | None = None
        if isinstance(source, GridClient):
            self._client = source
            return
        targets = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
        if not all(isinstance(target, str) for target in targets):
            raise TypeError(
                "reranker_url must be an address such as 'localhost:50051', a list of addresses, or a RerankerClient, "
                f"not {type(source).__name__}."
            )
        if not targets or not all(targets):
            raise ValueError("reranker_url must name at least one address, such as 'localhost:50051', and none empty.")
        self._targets = targets

    def get(self) -> GridClient:
        """The client; opened by the first call."""
        if self._client is None:
            from loss_client.client import RerankerClient

            assert self._targets is not None
            client = RerankerClient(self._targets)
            weakref.finalize(self, client.close)
            self._client = client
        return self._client

    def describe(self) -> str | list[str]:
        """The addresses, without user names, passwords and parameters; or the type of the caller's client."""
        if self._targets is None:
            return type(self._client).__name__
        public = [re.sub(r"^(\w+://)?[^/@]*@", r"\1", target.split("?")[0]) for target in self._targets]
        return public[0] if len(public) == 1 else public

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedClient:
        return SharedClient(self._source())

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedClient, (self._source(),)

    def _source(self) -> Any:
        return self._client if self._targets is None else self._targets
