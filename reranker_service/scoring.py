"""Pairs over a text table become scores: encode each text once, join pairs, run them, express the result.

Cross-encoders and causal rerankers read both texts of a pair together: one sequence a pair. Bi-encoders read each
text alone: one sequence a distinct text, and a grid of pairs is one matrix product.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

from reranker.v1 import reranker_pb2 as pb

from .encoding import EncodedText, Encoder, NoRoomError
from .engines.base import Engine, EngineDeadError, TokenSequence
from .errors import EngineFailedError, InvalidRequestError, RerankError, ScoringError, invalid
from .model import ModelSpec
from .pairs import Pairs
from .scheduling import Job, Scheduler
from .texts import Embedding, Role, TextTable
from .validation import ModelFacts


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of some pairs and what they cost.

    Attributes:
        scores: float32, finite, shape ``(len(pairs),)``; a grid's are row-major.
        usage: The counts and times of the contract's ``Usage``.
    """

    scores: NDArray[np.float32]
    usage: pb.Usage


@dataclass(slots=True)
class _Cost:
    """What the engine did for one reply."""

    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    tokens: int = 0

    def add(self, job: Job) -> None:
        self.tokens += job.tokens
        self.started = job.started if self.started is None else min(self.started, job.started)

    def usage(self, pairs: int, truncated: int) -> pb.Usage:
        now = time.monotonic()
        started = now if self.started is None else self.started
        return pb.Usage(
            pairs=pairs,
            truncated_pairs=truncated,
            tokens=self.tokens,
            queue_seconds=max(0.0, started - self.arrived),
            engine_seconds=now - started,
        )


class _Joined(Sequence[TokenSequence]):
    """The inputs of some pairs, joined when they are read: what never reaches the engine costs nothing."""

    def __init__(
        self,
        encoder: Encoder,
        queries: Sequence[EncodedText],
        documents: Sequence[EncodedText],
        query_at: NDArray[np.int64],
        document_at: NDArray[np.int64],
        positions: NDArray[np.intp],
        max_length: int,
    ) -> None:
        self._encoder = encoder
        self._queries = queries
        self._documents = documents
        self._query_at = query_at
        self._document_at = document_at
        self._positions = positions
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> TokenSequence: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenSequence]: ...

    def __getitem__(self, index: int | slice) -> TokenSequence | list[TokenSequence]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        position = self._positions[index]
        query, document = self._queries[self._query_at[position]], self._documents[self._document_at[position]]
        return self._encoder.join(query, document, self._max_length)[0]


class Scorer:
    """Scores pairs with one model on one engine."""

    def __init__(self, spec: ModelSpec, encoder: Encoder, engine: Engine) -> None:
        self._spec = spec
        self._encoder = encoder
        self._engine = engine
        self._scheduler = Scheduler(engine)
        # Encoding leaves the event loop free; tokenizers spread one call over all cores by themselves.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")

    @property
    def facts(self) -> ModelFacts:
        """What requests may ask of the model."""
        return ModelFacts(
            min_length=self._encoder.min_length,
            max_length=self._spec.max_length,
            default_length=self._spec.default_length,
            supports_instruction=self._encoder.supports_instruction,
            default_instruction=self._encoder.default_instruction,
        )

    async def score(self, table: TextTable, pairs: Pairs) -> Scored:
        """Score pairs of texts of ``table``.

        Raises:
            InvalidRequestError: A pair is over-long and the options say to reject such pairs.
            EngineFailedError: The engine is gone.
            ScoringError: The engine gave something that is no score.
        """
        try:
            if self._spec.kind == "bi-encoder":
                raw, usage = await self._by_embedding(table, pairs)
            else:
                raw, usage = await self._by_sequence(table, pairs)
        except EngineDeadError as error:
            raise EngineFailedError(f"the engine has died: {error}") from error
        except NoRoomError as error:
            raise invalid("options.max_length", str(error)) from error
        except RerankError:
            raise
        except Exception as error:
            raise ScoringError(f"scoring failed: {type(error).__name__}: {error}") from error
        if not np.isfinite(raw).all():
            raise ScoringError(
                "the model gave a score that is not finite; its weights or its number format are at fault"
            )
        return Scored(raw if table.options.raw else self._probability(raw), usage)

    def close(self) -> None:
        """End the encoding thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _probability(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._spec.kind == "bi-encoder":
            return (1 + raw) * np.float32(0.5)
        # The logistic function, written so that no exponential overflows.
        small = np.exp(-np.abs(raw))
        probability: NDArray[np.float32] = np.where(raw >= 0, 1 / (1 + small), small / (1 + small))
        return probability

    async def _encode(self, table: TextTable, role: Role, ids: NDArray[np.int64]) -> list[EncodedText]:
        async def compute(missing: list[int]) -> Sequence[EncodedText]:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._encode_now, [table.texts[one] for one in missing], role, table.options.instruction
            )

        return await table.encoded[role].get(ids, compute)

    def _encode_now(self, texts: list[str], role: Role, instruction: str | None) -> Sequence[EncodedText]:
        if role == "query":
            return self._encoder.encode_queries(texts, instruction)
        return self._encoder.encode_documents(texts)

    async def _by_sequence(self, table: TextTable, pairs: Pairs) -> tuple[NDArray[np.float32], pb.Usage]:
        cost = _Cost()
        max_length = table.options.max_length
        queries = await self._encode(table, "query", pairs.query_ids)
        documents = await self._encode(table, "document", pairs.document_ids)
        query_at, document_at = self._positions(pairs)
        lengths = self._encoder.lengths(queries, documents, query_at, document_at)  # (n,), nothing cut
        cut = lengths > max_length
        truncated = int(np.count_nonzero(cut))
        if truncated and table.options.reject_over_long:
            first = int(np.flatnonzero(cut)[0])
            raise _over_long(
                f"{truncated} of {len(pairs)} pairs are too long; the first, query {query_at[first]} with document "
                f"{document_at[first]}, has {lengths[first]} tokens",
                max_length,
            )
        order = self._order(pairs, lengths, query_at)

        def make(begin: int, end: int) -> Sequence[TokenSequence]:
            return _Joined(self._encoder, queries, documents, query_at, document_at, order[begin:end], max_length)

        job = Job(table.ticket, np.minimum(lengths, max_length)[order], make)
        scores = np.empty(len(pairs), dtype=np.float32)
        scores[order] = await self._scheduler.run(job)
        cost.add(job)
        return scores, cost.usage(len(pairs), truncated)

    @staticmethod
    def _positions(pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions into ``pairs.query_ids`` and ``pairs.document_ids``, pair by pair."""
        rows, columns = np.arange(len(pairs.query_ids)), np.arange(len(pairs.document_ids))
        return Pairs(rows, columns, pairs.grid).flat()

    def _order(self, pairs: Pairs, lengths: NDArray[np.int64], query_at: NDArray[np.int64]) -> NDArray[np.intp]:
        """In which order pairs go to the engine."""
        if self._engine.pads:
            # Like lengths together; the longest first, so that a batch too large for the memory fails at once.
            return np.argsort(-lengths, kind="stable")
        # One query's documents next to each other: they share a prefix, which the engine keeps.
        return np.argsort(pairs.query_ids[query_at], kind="stable")

    async def _by_embedding(self, table: TextTable, pairs: Pairs) -> tuple[NDArray[np.float32], pb.Usage]:
        cost = _Cost()
        queries, documents = await asyncio.gather(
            self._embed(table, "query", pairs.query_ids, cost), self._embed(table, "document", pairs.document_ids, cost)
        )
        left = np.stack([query.vector for query in queries])  # (Q or n, dim)
        right = np.stack([document.vector for document in documents])  # (D or n, dim)
        cut_left = np.array([query.truncated for query in queries])
        cut_right = np.array([document.truncated for document in documents])
        if pairs.grid:
            scores, cut = (left @ right.T).ravel(), np.logical_or.outer(cut_left, cut_right)
        else:
            scores, cut = np.einsum("ij,ij->i", left, right), cut_left | cut_right
        # Rounding can take the cosine of equal texts a hair past 1.
        np.clip(scores, -1.0, 1.0, out=scores)
        return scores, cost.usage(len(pairs), int(np.count_nonzero(cut)))

    async def _embed(self, table: TextTable, role: Role, ids: NDArray[np.int64], cost: _Cost) -> list[Embedding]:
        max_length = table.options.max_length

        async def compute(missing: list[int]) -> list[Embedding]:
            encoded = await self._encode(table, role, np.array(missing))
            sequences, cut = zip(*(self._encoder.single(text, max_length) for text in encoded), strict=True)
            if table.options.reject_over_long and any(cut):
                first = cut.index(True)
                raise _over_long(f"{sum(cut)} texts are too long; the first is {role} {missing[first]}", max_length)
            lengths = np.array([len(sequence.ids) for sequence in sequences])
            # Like lengths together; vectors come back in this order.
            order = np.argsort(-lengths, kind="stable")
            job = Job(table.ticket, lengths[order], lambda begin, end: [sequences[one] for one in order[begin:end]])
            vectors = np.empty_like(found := await self._scheduler.run(job))
            vectors[order] = found
            cost.add(job)
            return [Embedding(*one) for one in zip(vectors, cut, strict=True)]

        return await table.embedded[role].get(ids, compute)


def _over_long(what: str, max_length: int) -> InvalidRequestError:
    return invalid(
        "options.over_long",
        f"{what}; the limit is {max_length} tokens: shorten the texts, raise max_length, or leave over_long at "
        "OVER_LONG_TRUNCATE",
    )
