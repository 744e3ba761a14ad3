"""RerankerClient: scores pairs with a served reranker; blocking methods over one event loop in a background thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count as counter
from os import PathLike
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from loss_client.client import kinds, ready
from loss_client.client.addresses import parse_addresses
from loss_client.client.calls import Calls
from loss_client.client.chunks import STREAM_CHUNK_PAIRS
from loss_client.client.credentials import Pem, make_credentials
from loss_client.client.endpoints import ChannelSettings
from loss_client.client.job import Ids, pair_grid, pair_list
from loss_client.client.memory import ScoreMemory
from loss_client.client.one_model import OneModel
from loss_client.client.options import JobOptions, count, options_message, positive_seconds
from loss_client.client.ranking import RankedDocument, read_ranking
from loss_client.client.scores import RawScale, ScoreMatrix, ScoreType
from loss_client.client.texts import TextTable
from loss_client.client.turns import ModelPin, ServerState
from loss_client.former_names import accept_former_names
from reranker.v1 import reranker_pb2 as pb

_WHOLE_CHUNK_PAIRS = 1024  # of jobs that are read as a whole


class RerankerClient:
    """Scores (query, document) pairs with a reranker behind a gRPC service.

    The client makes its thread and its connections at first use. They end with ``close``, with the ``with`` block,
    with the last reference to the client, or with the interpreter. Any thread may use the client, and so may a forked
    child, which makes its own thread and connections. Equal texts are sent once. After a lost connection the client
    connects again, after a backoff, and sends only chunks without an answer. It does the same at another server if a
    server stalls. Errors that another attempt would meet again are raised at once. With several servers, each takes
    chunks of a job as fast as it answers; calls, and jobs of one or two chunks, go to the servers in turn.

    All scores of one job come from one model, told by its fingerprint. The client's model is the one that most servers
    have at first. A server of another model is left out, with one warning, as long as a server of the client's model
    is left; ``servers`` has the state of each.

    All scoring methods take the same options by keyword:

    - ``instruction``: the task in words, for models that take an instruction. Default: the model's own.
    - ``max_length``: longest input in tokens. Default: the server's.
    - ``score_type``: ``"probability"`` (in [0, 1]) or ``"raw"`` (the model's logit; for a bi-encoder the cosine).
    - ``timeout``: seconds, in place of the client's ``timeout``.

    Methods that score many pairs also take ``priority``, ``"bulk"`` (the default) or ``"interactive"``, and
    ``chunk_pairs``, the most pairs of one message. Default: the number that the server prefers. If it names none: 1,024
    in methods that return all scores at once and 128 in methods that return them as they arrive, and up to 4,096 in the
    middle of a large job for a server that sends progress messages.

    Args:
        address: ``"host:port"``, gRPC's own forms (``"dns:///..."``, ``"unix:..."``), ``"grpc://host:port"``,
            ``"grpcs://host:port"`` (TLS), or a list of these. A host name stands for the servers at all of its
            addresses, which the client follows. Servers that have just failed are skipped.
        timeout: Most seconds of a call, and most seconds that a job may go without finished work, reconnecting
            included. Finished work is a score of the job or, at a server of contract 1.1, of any other call.
        stall_timeout: Most seconds that a server may send nothing before another attempt is made, at another server if
            there is one. Servers of contract 1.1 send progress messages while they work. Default: a third of the
            timeout; a server of contract 1.0 that is the only one then keeps the whole timeout.
        metadata: Pairs of key (lower case) and value, sent with every call.
        token: Token that is sent with every call. Default: the variable ``RERANKER_CLIENT_TOKEN``, if it is set.
        token_file: File that holds the token and nothing else; it is read again when it changes. Default: the file that
            ``RERANKER_CLIENT_TOKEN_FILE`` names, if it is set.
        plaintext_token: Whether the token may be sent to another machine without TLS.
        root_certificates: Authorities that TLS trusts: PEM bytes, or the path of a PEM file. Default: the file that
            ``RERANKER_CLIENT_TLS_CA`` names, or gRPC's own.
        client_certificate: Certificate of this client, for servers that ask for one (mutual TLS), as PEM bytes or the
            path of a PEM file. Default: the file that ``RERANKER_CLIENT_TLS_CERT`` names.
        client_key: Private key of ``client_certificate``, likewise. Default: the file that ``RERANKER_CLIENT_TLS_KEY``
            names.
        cache_pairs: Most scores of listed pairs (``score_pairs``, ``stream_pairs``) that the client keeps, so
            that pairs that come again are not sent again; about 300 bytes each. 0 keeps none. Scores of a server
            without streams are not kept.

    Raises:
        ValueError: An address has none of the right forms, an argument is out of range, a file is unusable, or the
            token would be sent to another machine without TLS.
    """

    @accept_former_names(target="address", remembered_pairs="cache_pairs")
    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout: float = 60.0,
        stall_timeout: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        plaintext_token: bool = False,
        root_certificates: Pem | None = None,
        client_certificate: Pem | None = None,
        client_key: Pem | None = None,
        cache_pairs: int = 1 << 18,
    ) -> None:
        addresses = parse_addresses(address)
        credentials = make_credentials(
            addresses,
            token=token,
            token_file=token_file,
            plaintext_token=plaintext_token,
            root_certificates=root_certificates,
            client_certificate=client_certificate,
            client_key=client_key,
        )
        self._timeout = positive_seconds("timeout", timeout)
        self._stall_timeout = None if stall_timeout is None else positive_seconds("stall_timeout", stall_timeout)
        self._settings = ChannelSettings(addresses, tuple((key, value) for key, value in metadata), credentials)
        if cache_pairs < 0:
            raise ValueError(f"cache_pairs is {cache_pairs}; it has to be 0 or more")
        self._cache_pairs = cache_pairs
        self._memory = ScoreMemory(cache_pairs)
        self._steps = counter()
        self._calls = Calls(self._settings, self._timeout, self._stall_timeout, self._memory)

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
            top_n: Most documents to return, 1 or more. Default: all.
            instruction: See the class.
            max_length: See the class.
            score_type: See the class.
            return_documents: Whether to return the texts as well.
            timeout: See the class.

        Raises:
            RerankerError: The server could not be reached in time, refused the request, or sent a wrong answer.
        """
        table = TextTable()
        table.add([query], "query")
        table.add(documents, "documents")
        request = pb.RerankRequest(
            query=query,
            documents=documents,
            top_n=count("top_n", top_n),
            return_documents=return_documents,
            options=options_message(instruction, max_length, score_type),
        )
        return self._calls.call(
            lambda stub: stub.Rerank, request, timeout, lambda response: read_ranking(response, len(documents))
        )

    def score_pairs(
        self, pairs: Sequence[tuple[str, str]], *, chunk_pairs: int | None = None, **options: Unpack[JobOptions]
    ) -> NDArray[np.float32]:
        """Score pairs of a query and a document; returns scores of shape ``(len(pairs),)``.

        Args:
            pairs: The pairs. Equal ones are scored once.
            chunk_pairs: See the class.
            **options: See the class.

        Raises:
            RerankerError: The job failed.
        """
        queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
        every = range(len(pairs))
        asked = pair_list(queries, documents, every, every)
        matrix = self._calls.begin(asked, _WHOLE_CHUNK_PAIRS, chunk_pairs, recurring=True, **options)
        return self._calls.finish(matrix)[:, 0]

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: Ids,
        document_ids: Ids,
        *,
        chunk_pairs: int | None = None,
        recurring: bool = True,
        bands: Ids | None = None,
        pin: ModelPin | None = None,
        step: int | None = None,
        **options: Unpack[JobOptions],
    ) -> ScoreMatrix:
        """Begin to score listed pairs of queries and documents, and return at once.

        Equal pairs are scored once. Pairs whose scores the client remembers are not sent, as long as the server has
        the same model.

        Args:
            queries: The queries.
            documents: The documents.
            query_ids: For each of the n pairs the position of its query.
            document_ids: For each of the n pairs the position of its document.
            chunk_pairs: See the class.
            recurring: Whether the pairs will come again, such as positives in every epoch. The client remembers other
                pairs only in the space that recurring pairs leave.
            bands: For each of the n pairs the number of its band, 0 or more; pairs of a lower band are scored first.
                Default: all pairs are in one band.
            pin: See ``one_model``.
            step: See ``one_model``.
            **options: See the class.

        Returns:
            The scores, shape ``(n, 1)``: one row for each pair, readable as it arrives. Within a band, pairs of one
            query are scored together; queries are scored in the order of their first pairs.

        Raises:
            IndexError: A position is out of range.
        """
        asked = pair_list(queries, documents, query_ids, document_ids, bands)
        return self._calls.begin(
            asked, STREAM_CHUNK_PAIRS, chunk_pairs, recurring=recurring, pin=pin, step=step, **options
        )

    def score_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        chunk_pairs: int | None = None,
        **options: Unpack[JobOptions],
    ) -> NDArray[np.float32]:
        """Score every query with every document; returns scores of shape ``(len(queries), len(documents))``.

        Args:
            queries: The queries. Equal ones are scored once.
            documents: The documents. Equal ones are scored once.
            chunk_pairs: See the class.
            **options: See the class.

        Raises:
            RerankerError: The job failed.
        """
        asked = pair_grid(queries, documents)
        return self._calls.finish(self._calls.begin(asked, _WHOLE_CHUNK_PAIRS, chunk_pairs, **options))

    def stream_grid(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        chunk_pairs: int | None = None,
        pin: ModelPin | None = None,
        step: int | None = None,
        **options: Unpack[JobOptions],
    ) -> ScoreMatrix:
        """Begin to score every query with every document, first query first, and return at once.

        Args:
            queries: The Q queries. Equal ones are scored once.
            documents: The D documents. Equal ones are scored once.
            chunk_pairs: See the class. With fewer the first rows arrive sooner, with more there is less overhead.
            pin: See ``one_model``.
            step: See ``one_model``.
            **options: See the class.

        Returns:
            The scores, shape ``(Q, D)``; each row is readable as soon as it has arrived. Reading raises the job's
            errors.
        """
        asked = pair_grid(queries, documents)
        return self._calls.begin(asked, STREAM_CHUNK_PAIRS, chunk_pairs, pin=pin, step=step, **options)

    def one_model(self) -> OneModel:
        """Return a view of this client for one training step: its jobs get all their scores from one model, or fail.

        The first score decides which model that is.

        Bulk jobs of several views begin in the order in which the views were made, so that a step's scores are complete
        before those of later steps. A job begins when jobs of earlier views have a quarter of their scores or less
        still to come, and at once if a reader waits for its scores. Its timeout begins with it. Jobs without a view,
        jobs of interactive priority and calls do not wait.
        """
        pin, step = ModelPin(), next(self._steps)
        return OneModel(
            stream_grid=partial(self.stream_grid, pin=pin, step=step),
            stream_pairs=partial(self.stream_pairs, pin=pin, step=step),
            raw_scale=partial(self.raw_scale, pin=pin),
        )

    def wait_until_ready(
        self, timeout: float = 600.0, on_progress: Callable[[str], object] | None = None
    ) -> pb.GetModelInfoResponse:
        """Wait until a server serves its model, such as one that still loads it, and return what it serves.

        Args:
            timeout: Most seconds to wait.
            on_progress: Called every 5 seconds, in this thread, with the time that has passed and the last error.
                Default: these are logged as information.

        Raises:
            IncompatibleServerError: A server speaks another major version of the contract, or is no reranker.
            RerankerError: No server was ready in time, or one refused the call.
        """
        return ready.wait_until_ready(self._calls, timeout, on_progress)

    @property
    def servers(self) -> tuple[ServerState, ...]:
        """The state of each server, as the client last saw it; ``"unused"`` before the first use."""
        return self._calls.background.states()

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the client's model; None before the first answer of a server."""
        return self._calls.background.model()

    def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Ask a server for its model and its limits.

        Raises:
            IncompatibleServerError: The server speaks another major version of the contract.
            RerankerError: The server could not be reached in time.
        """
        return self._model_info(timeout)

    def raw_scale(self, timeout: float | None = None, *, pin: ModelPin | None = None) -> RawScale:
        """Ask a server whether its raw scores are logits or cosines.

        Args:
            timeout: See the class.
            pin: See ``one_model``.

        Raises:
            IncompatibleServerError: The server speaks another major version of the contract, or names a kind of model
                that this client does not know.
            RerankerError: The server could not be reached in time.
        """
        return kinds.raw_scale(self._model_info(timeout, pin))

    def _model_info(self, timeout: float | None, pin: ModelPin | None = None) -> pb.GetModelInfoResponse:
        return self._calls.call(lambda stub: stub.GetModelInfo, pb.GetModelInfoRequest(), timeout, pin=pin)

    def close(self) -> None:
        """End all jobs, connections and the thread. Calls that wait for scores raise ``ClientClosedError``."""
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # A thread and sockets cannot be pickled: a copy makes its own.
        return _rebuild, (self._settings, self._timeout, self._stall_timeout, self._cache_pairs)


def _rebuild(
    settings: ChannelSettings, timeout: float, stall_timeout: float | None, cache_pairs: int
) -> RerankerClient:
    return RerankerClient(
        [str(address) for address in settings.addresses],
        timeout=timeout,
        stall_timeout=stall_timeout,
        metadata=settings.metadata,
        **settings.credentials.arguments(),
        cache_pairs=cache_pairs,
    )
