"""Preselectors: fast models that tell for each anchor which documents are similar to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import nn

from loss_client.filter.jobs import ScoreRows, ScoringClient
from loss_client.filter.nearest.cancellation import Cancellation
from loss_client.filter.nearest.embeddings import Embed, EmbeddingMemory

GivenPreselector = ScoringClient | SentenceTransformer | Callable[[list[str]], Any]
"""Client of a served bi-encoder, a model, or a function from texts to embeddings of shape ``(texts, dim)``."""

_BATCH_SIZE = 64


class Similarities(Protocol):
    """Similarities of queries and documents, readable some rows at a time."""

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """Return the similarities of queries ``begin`` to ``end`` (excluded), shape ``(end - begin, documents)``.

        Rows are read once and in order, and callers may write into the array.
        """


class Preselector(Protocol):
    """A model that compares queries with documents."""

    def compare(self, queries: Sequence[str], documents: Sequence[str], cancellation: Cancellation) -> Similarities:
        """Compare every query with every document; both are distinct texts. Runs in the background thread."""


@dataclass(frozen=True, slots=True)
class _Cosines:
    """Cosines of embeddings of unit length; implements ``Similarities``."""

    queries: NDArray[np.float32]  # (queries, dim)
    documents: NDArray[np.float32]  # (documents, dim)

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        return self.queries[begin:end] @ self.documents.T


class EmbeddingPreselector:
    """Compares texts by the cosine of their embeddings, each of which is computed once; implements ``Preselector``.

    Args:
        embed_queries: Embeds queries.
        embed_documents: Embeds documents. Default: ``embed_queries``.
        memory: Remembers the embeddings.
    """

    def __init__(
        self, embed_queries: Embed, embed_documents: Embed | None = None, memory: EmbeddingMemory | None = None
    ) -> None:
        self._queries = embed_queries
        self._documents = embed_documents
        self._memory = EmbeddingMemory() if memory is None else memory

    def compare(self, queries: Sequence[str], documents: Sequence[str], cancellation: Cancellation) -> _Cosines:
        """See ``Preselector``."""
        two = self._documents is not None
        embed, kind = (self._documents, "document") if self._documents is not None else (self._queries, "")
        return _Cosines(
            self._memory.read(queries, self._queries, "query" if two else "", cancellation.check),
            self._memory.read(documents, embed, kind, cancellation.check),
        )


class ModelEmbedding:
    """Embeds texts with a SentenceTransformer, in evaluation mode and without gradients.

    Args:
        model: The model.
        query: Whether the texts are queries; a model may have another prompt for them.
    """

    def __init__(self, model: SentenceTransformer, query: bool) -> None:
        self._model = model
        self._query = query

    def __call__(self, texts: list[str]) -> Any:
        """Embed texts, shape ``(len(texts), dim)``."""
        encode = self._model.encode_query if self._query else self._model.encode_document
        return encode(texts, batch_size=_BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True)


class _GridSimilarities:
    """Raw scores of a served model; implements ``Similarities``."""

    def __init__(self, job: ScoreRows) -> None:
        self._job = job

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        found = self._job.rows(begin, end)
        self._job.release(begin, end)
        return found


class ServedPreselector:
    """Compares texts by the raw scores of a served bi-encoder, which are cosines; implements ``Preselector``.

    The server remembers embeddings in its own cache.

    Args:
        client: Client of the server.
    """

    def __init__(self, client: ScoringClient) -> None:
        self._client = client

    def compare(
        self, queries: Sequence[str], documents: Sequence[str], cancellation: Cancellation
    ) -> _GridSimilarities:
        """See ``Preselector``."""
        job = cancellation.begin(
            lambda: self._client.stream_grid(
                queries,
                documents,
                instruction=None,
                max_length=None,
                score_type="raw",
                chunk_pairs=None,
                timeout=None,
            )
        )
        return _GridSimilarities(job)


def make_preselector(given: GivenPreselector, trained: nn.Module) -> Preselector:
    """Return the preselector for what the loss was given.

    Args:
        given: See ``GivenPreselector``.
        trained: The model that the loss trains.

    Raises:
        TypeError: It is none of these.
        ValueError: It is the trained model.
    """
    if given is trained:
        raise ValueError(
            "preselector is the model that is trained. Its embeddings would change with every step, and it would "
            "embed in the background in training mode. Give a copy, or another small model."
        )
    if isinstance(given, ScoringClient):
        return ServedPreselector(given)
    if isinstance(given, SentenceTransformer):
        return EmbeddingPreselector(ModelEmbedding(given, query=True), ModelEmbedding(given, query=False))
    if callable(given):
        return EmbeddingPreselector(given)
    raise TypeError(
        "preselector must be the address of a served bi-encoder, a RerankerClient, a SentenceTransformer or a function "
        f"from a list of texts to an array of embeddings, not a {type(given).__name__}."
    )
