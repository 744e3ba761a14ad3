"""RerankerClient: what training code calls. Blocking, usable from any thread, over one event loop in the background."""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from loss_client.client.background import Background
from loss_client.client.channels import Channels, Patience
from loss_client.client.chunks import TextTable, distinct
from loss_client.client.endpoints import ChannelSettings
from loss_client.client.errors import ClientClosedError, ScoreError
from loss_client.client.memory import ScoreMemory
from loss_client.client.scores import ScoreMatrix, ScoreType
from loss_client.client.stream import Job, run_job
from loss_client.client.targets import parse_targets
from reranker.v1 import reranker_pb2 as pb

T = TypeVar("T")

Priority = Literal["bulk", "interactive"]
"""What a server prefers when it has more work than it can do at once: ``"interactive"`` overtakes ``"bulk"``."""

_SCORE_TYPES = {"probability": pb.SCORE_TYPE_PROBABILITY, "raw": pb.SCORE_TYPE_RAW}
_PRIORITIES = {"bulk": pb.PRIORITY_BULK, "interactive": pb.PRIORITY_INTERACTIVE}


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: Its position among the documents that were given.
        score: Its relevance to the query; its range depends on the score type.
        document: Its text, where the texts were asked for.
    """

    index: int
    score: float
    document: str | None = None


class RerankerClient:
    """Scores (query, document) pairs with a reranker that is served elsewhere.

    Its thread and connections are made at first use and end with ``close``, with the ``with`` block, with the last
    reference, or with the interpreter. It may be used from any thread, and in a forked child, which makes its own.
    Equal texts are sent once. Lost connections are made again, and only what had no answer is sent again.

    All scoring methods take the same options by keyword:

    - ``instruction``: the task in words, for models that take one. Default: the model's own.
    - ``max_length``: longest input in tokens. Default: the server's.
    - ``score_type``: ``"probability"`` (in [0, 1]) or ``"raw"`` (the model's logit; for a bi-encoder the cosine).
    - ``timeout``: replaces the client's.

    Args:
        target: ``"host:port"``, gRPC's own forms (``"dns:///..."``, ``"unix:..."``), ``"grpc://host:port"``,
            ``"grpcs://host:port"`` (TLS), or a list of these: jobs and calls go to each in turn, past those that fail.
        timeout: Seconds that a call may take, or a job may go without a score, reconnecting included.
        metadata: Pairs of key (lower case) and value, sent with every call.
        root_certificates: PEM bytes of the authorities that TLS trusts. Default: gRPC's own.
        remembered_pairs: How many scores of listed pairs (``score_pairs``, ``stream_pairs``) the client keeps, for
            pairs that come again; about 300 bytes each. 0: none. A server without streams is asked every time.

    Raises:
        ValueError: A target has none of the right forms, or an argument is out of range.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        timeout: float = 60.0,
        metadata: Sequence[tuple[str, str]] = (),
        root_certificates: bytes | None = None,
        remembered_pairs: int = 1 << 18,
    ) -> None:
        targets = parse_targets(target)
        if root_certificates is not None and not any(each.secure for each in targets):
            raise ValueError("root_certificates are given but no target uses TLS: write it as 'grpcs://host:port'")
        self._timeout = _positive("timeout", timeout)
        self._settings = ChannelSettings(targets, tuple((key, value) for key, value in metadata), root_certificates)
        if remembered_pairs < 0:
            raise ValueError(f"remembered_pairs is {remembered_pairs}; it has to be 0 or more")
        self._remembered_pairs = remembered_pairs
        self._memory = ScoreMemory(remembered_pairs)
        self._background = Background(self._settings)
        self._finalizer = weakref.finalize(self, self._background.close)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        score_type: ScoreType = "probability",
        return_documents: bool = False,
        timeout: float | None = None,
    ) -> list[RankedDocument]:
        """Rank documents by relevance to a query, best first.

        Args:
            query: The query.
            documents: The documents, at least one.
            top_n: How many to return, 1 or more. Default: all.
            instruction: See the class.
            max_length: See the class.
            score_type: See the class.
            return_documents: Whether to return the texts as well.
            timeout: See the class.

        Raises:
            RerankerError: The server could not be reached in time, refused the request, or answered nonsense.
        """
        table = TextTable()
        table.add([query], "query")
        table.add(documents, "documents")
        request = pb.RerankRequest(
            query=query,
            documents=documents,
            top_n=_count("top_n", top_n),
            return_documents=return_documents,
            options=_options(instruction, max_length, score_type),
        )
        return self._call(
            lambda stub: stub.Rerank, request, timeout, lambda response: _ranking(response, len(documents))
        )

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        score_type: ScoreType = "probability",
        chunk_pairs: int = 1024,
        priority: Priority = "bulk",
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """Score pairs of a query and a document; returns scores of shape ``(len(pairs),)``.

        Equal pairs are scored once. ``chunk_pairs`` is the most pairs of a message; for the others see the class.

        Raises:
            RerankerError: The job failed.
        """
        every = range(len(pairs))
        matrix = self.stream_pairs(
            *([query for query, _ in pairs], [document for _, document in pairs], every, every),
            instruction=instruction,
            max_length=max_length,
            score_type=score_type,
            chunk_pairs=chunk_pairs,
            priority=priority,
            timeout=timeout,
        )
        return self._finish(matrix)[:, 0]

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: Sequence[int] | NDArray[np.integer[Any]],
        document_ids: Sequence[int] | NDArray[np.integer[Any]],
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        score_type: ScoreType = "probability",
        chunk_pairs: int = 128,
        priority: Priority = "bulk",
        timeout: float | None = None,
        recurring: bool = True,
    ) -> ScoreMatrix:
        """Begin to score some pairs of queries and documents, and return at once.

        Equal pairs are scored once, and pairs that this client had scored before are not asked for again, as long as
        the same model is served.

        Args:
            queries: The queries.
            documents: The documents.
            query_ids: For each of the n pairs the position of its query.
            document_ids: For each of the n pairs the position of its document.
            instruction: See the class.
            max_length: See the class.
            score_type: See the class.
            chunk_pairs: Most pairs of a message.
            priority: What the server is told of the job's urgency.
            timeout: See the class.
            recurring: Whether the pairs will be asked for again, such as positives in every epoch. The client
                remembers others only while it has room that these do not need.

        Returns:
            The scores, shape ``(n, 1)``: a row for each pair, readable as it arrives. Pairs of one query are scored
            together, queries in order of their first pair.

        Raises:
            IndexError: A pair names a query or document that there is not.
        """
        table = TextTable()
        query_texts = table.add(queries, "queries")[_positions("query_ids", query_ids, len(queries))]
        document_texts = table.add(documents, "documents")[_positions("document_ids", document_ids, len(documents))]
        if len(query_texts) != len(document_texts):
            raise ValueError(
                f"{len(query_texts)} query_ids and {len(document_texts)} document_ids: each pair needs both"
            )
        texts = max(len(table.texts), 1)
        codes, row_ids = distinct(query_texts * texts + document_texts)
        # Pairs that share a query reach the model next to each other.
        order = _grouped(codes // texts)
        codes = codes[order]
        if row_ids is None:
            row_ids = np.arange(len(order))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return self._begin(
            table, codes // texts, codes % texts, (len(query_texts), 1), _options(instruction, max_length, score_type),
            priority, chunk_pairs, timeout, grid=False, row_ids=place[row_ids], recurring=recurring,
        )  # fmt: skip

    def score_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        score_type: ScoreType = "probability",
        chunk_pairs: int = 1024,
        priority: Priority = "bulk",
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """Score every query with every document; returns scores of shape ``(len(queries), len(documents))``.

        ``chunk_pairs`` is the most pairs of a message; for the others see the class.

        Raises:
            RerankerError: The job failed.
        """
        return self._finish(
            self.stream_grid(
                queries,
                documents,
                instruction=instruction,
                max_length=max_length,
                score_type=score_type,
                chunk_pairs=chunk_pairs,
                priority=priority,
                timeout=timeout,
            )
        )

    def stream_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        score_type: ScoreType = "probability",
        chunk_pairs: int = 128,
        priority: Priority = "bulk",
        timeout: float | None = None,
    ) -> ScoreMatrix:
        """Begin to score every query with every document, first query first, and return at once.

        Args:
            queries: The Q queries. Equal ones are scored once.
            documents: The D documents. Equal ones are scored once.
            instruction: See the class.
            max_length: See the class.
            score_type: See the class.
            chunk_pairs: Most pairs of a message. Fewer: the first rows are there sooner. More: less overhead.
            priority: What the server is told of the job's urgency.
            timeout: See the class.

        Returns:
            The scores, shape ``(Q, D)``, whose rows are readable as they arrive. Errors of the job are raised there.
        """
        table = TextTable()
        rows, row_ids = distinct(table.add(queries, "queries"))
        columns, column_ids = distinct(table.add(documents, "documents"))
        return self._begin(
            table, rows, columns, (len(queries), len(documents)), _options(instruction, max_length, score_type),
            priority, chunk_pairs, timeout, grid=True, row_ids=row_ids, column_ids=column_ids,
        )  # fmt: skip

    def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Return what a server says of its model and limits.

        Raises:
            IncompatibleServerError: The server speaks another major version of the contract.
            RerankerError: The server could not be reached in time.
        """
        return self._call(lambda stub: stub.GetModelInfo, pb.GetModelInfoRequest(), timeout)

    def close(self) -> None:
        """End all jobs, connections and the thread. Who waits for scores gets ``ClientClosedError``."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A thread and sockets cannot travel: a copy connects by itself.
        return _rebuild, (self._settings, self._timeout, self._remembered_pairs)

    def _begin(
        self,
        table: TextTable,
        queries: NDArray[np.int64],
        documents: NDArray[np.int64],
        shape: tuple[int, int],
        options: pb.RerankOptions,
        priority: Priority,
        chunk_pairs: int,
        timeout: float | None,
        *,
        grid: bool,
        row_ids: NDArray[np.int64] | None = None,
        column_ids: NDArray[np.int64] | None = None,
        recurring: bool = False,
    ) -> ScoreMatrix:
        if priority not in _PRIORITIES:
            raise ValueError(f"priority is {priority!r}; it has to be one of {', '.join(map(repr, _PRIORITIES))}")
        if chunk_pairs < 1:
            raise ValueError(f"chunk_pairs is {chunk_pairs}; it has to be 1 or more")
        seconds = self._timeout if timeout is None else _positive("timeout", timeout)
        matrix = ScoreMatrix(shape, row_ids=row_ids, column_ids=column_ids, on_cancel=lambda: future.cancel())
        level = _PRIORITIES[priority]
        job = Job(
            table, queries, documents, grid, matrix, options, level, chunk_pairs, seconds, self._memory, recurring
        )
        future = self._background.submit(lambda channels: self._run(job, channels))
        return matrix

    async def _run(self, job: Job, channels: Channels) -> None:
        # A method, so that the client lives as long as its jobs run, also where nobody else holds it.
        await run_job(job, channels)

    @staticmethod
    def _finish(matrix: ScoreMatrix) -> NDArray[np.float32]:
        try:
            return matrix.result()
        except BaseException:  # an interrupt too: nobody will read the rest
            matrix.cancel()
            raise

    def _call(
        self,
        rpc: Callable[[Any], Any],
        request: Any,
        timeout: float | None,
        read: Callable[[Any], T] = lambda response: response,
    ) -> T:
        seconds = self._timeout if timeout is None else _positive("timeout", timeout)

        async def work(channels: Channels) -> T:
            return await channels.call(rpc, request, Patience(seconds), read)

        return self._wait(work)

    def _wait(self, work: Callable[[Channels], Coroutine[Any, Any, T]]) -> T:
        future = self._background.submit(work)
        try:
            return future.result()
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            raise ClientClosedError("the client was closed while it waited for an answer") from None
        except BaseException:
            future.cancel()
            raise


def _rebuild(settings: ChannelSettings, timeout: float, remembered_pairs: int) -> RerankerClient:
    return RerankerClient(
        [str(target) for target in settings.targets],
        timeout=timeout,
        metadata=settings.metadata,
        root_certificates=settings.root_certificates,
        remembered_pairs=remembered_pairs,
    )


def _positions(name: str, ids: Sequence[int] | NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    positions = np.asarray(ids, dtype=np.int64).reshape(-1)
    if len(positions) and not 0 <= positions.min() <= positions.max() < count:
        raise IndexError(f"{name} reach from {positions.min()} to {positions.max()}, but there are {count} texts")
    return positions


def _grouped(values: NDArray[np.int64]) -> NDArray[np.intp]:
    """An order that puts equal values next to each other, in order of first appearance."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(first[inverse.reshape(-1)], kind="stable")


def _ranking(response: pb.RerankResponse, documents: int) -> list[RankedDocument]:
    for result in response.results:
        if result.index >= documents or not np.isfinite(result.score):
            raise ScoreError(f"the server ranked document {result.index} of {documents} with the score {result.score}")
    return [
        RankedDocument(each.index, each.score, each.document if each.HasField("document") else None)
        for each in response.results
    ]


def _options(instruction: str | None, max_length: int | None, score_type: ScoreType) -> pb.RerankOptions:
    if score_type not in _SCORE_TYPES:
        raise ValueError(
            f"score_type is {score_type!r}; it has to be one of {', '.join(map(repr, get_args(ScoreType)))}"
        )
    return pb.RerankOptions(
        instruction=instruction, max_length=_count("max_length", max_length), score_type=_SCORE_TYPES[score_type]
    )


def _count(name: str, value: int | None) -> int | None:
    # What is in the field's range but not in the server's is for the server to refuse: it knows its limits.
    if value is not None and not 0 <= value < 2**32:
        raise ValueError(f"{name} is {value}; it has to be positive")
    return value


def _positive(name: str, seconds: float) -> float:
    if not seconds > 0:
        raise ValueError(f"{name} is {seconds}; it has to be a positive number of seconds")
    return seconds
