"""Validation: checks requests against all rules of the contract, and makes plain values of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from reranker.v1 import reranker_pb2 as pb

from ..scoring import OptionRanges, Pairs, ScoringOptions
from .errors import InvalidRequestError, Violation, invalid
from .limits import Limits
from .wire import SMALL_BYTES, find_excess

# A message of this contract has a few; a batch has one more a request.
_MOST_SUB_MESSAGES = 1024
# Bytes that a document takes in a result beyond those in its request, and the rest of a reply, at most.
_RESULT_BYTES = 24
_REPLY_BYTES = 4096

_LEAST_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Ranking:
    """A validated ``RerankRequest``."""

    query: str
    documents: Sequence[str]
    top_n: int
    return_documents: bool
    options: ScoringOptions


@dataclass(frozen=True, slots=True)
class Opening:
    """A validated ``StreamOpen``.

    Attributes:
        options: Options of all pairs of the stream.
        interactive: Whether the stream's pairs overtake bulk work.
        progress_seconds: Silence after which the client wants a sign of life; ``None`` for no such messages.
    """

    options: ScoringOptions
    interactive: bool
    progress_seconds: float | None


@dataclass(slots=True)
class Violations:
    """Collects broken rules, so that an error names all of them at once."""

    found: list[Violation] = field(default_factory=list)

    def add(self, path: str, description: str) -> None:
        """Note one broken rule."""
        self.found.append(Violation(path, description))

    def raise_if_any(self) -> None:
        """Raise ``InvalidRequestError`` if a broken rule was noted."""
        if self.found:
            raise InvalidRequestError(self.found)


class Validator:
    """Checks requests against the contract, the limits and the served model.

    Attributes:
        limits: The limits.
    """

    def __init__(self, limits: Limits, ranges: OptionRanges) -> None:
        self.limits = limits
        self._ranges = ranges
        documents, texts = pb.RerankRequest.DESCRIPTOR.fields_by_name["documents"], pb.StreamTexts.DESCRIPTOR.fields[0]
        requests = pb.RerankBatchRequest.DESCRIPTOR.fields_by_name["requests"]
        # Name of a message -> full name of a field -> most occurrences in the message
        self._field_limits = {
            "RerankRequest": {documents.full_name: limits.max_documents_per_request},
            "RerankBatchRequest": {
                requests.full_name: limits.max_requests_per_batch,
                documents.full_name: limits.max_pairs_per_batch,
            },
            "RerankStreamRequest": {texts.full_name: limits.max_texts_per_stream},
            "GetModelInfoRequest": {},
        }
        self._most_sub_messages = limits.max_requests_per_batch + _MOST_SUB_MESSAGES

    def size(self, message: type[Message], data: bytes) -> None:
        """Validate how many texts and sub-messages a message holds, before it is parsed."""
        if len(data) <= SMALL_BYTES:
            return
        excess = find_excess(data, message, self._field_limits[message.DESCRIPTOR.name], self._most_sub_messages)
        if excess is not None:
            field = excess.field.rpartition(".")[2]
            raise invalid(field, f"there are more than {excess.limit}, the limit of one {message.DESCRIPTOR.name}")

    def options(self, options: pb.RerankOptions, path: str = "options") -> ScoringOptions:
        """Validate options and fill in defaults. Raises ``InvalidRequestError``."""
        violations = Violations()
        validated = self._options(options, path, violations)
        violations.raise_if_any()
        return validated

    def rerank(self, request: pb.RerankRequest, path: str = "") -> Ranking:
        """Validate one ranking. Raises ``InvalidRequestError``."""
        violations = Violations()
        count, limit = len(request.documents), self.limits.max_documents_per_request
        if count == 0:
            violations.add(f"{path}documents", "there are none; give at least one document")
        elif count > limit:
            violations.add(f"{path}documents", f"there are {count}; the limit of one request is {limit}")
        if request.HasField("top_n") and request.top_n == 0:
            violations.add(f"{path}top_n", "is 0; give 1 or more, or leave it out for all documents")
        self._text(request.query, f"{path}query", violations)
        for position, document in enumerate(request.documents[: limit + 1]):
            self._text(document, f"{path}documents[{position}]", violations)
        if not path:
            self._reply([request], "return_documents", violations)
        options = self._options(request.options, f"{path}options", violations)
        violations.raise_if_any()
        top_n = min(request.top_n, count) if request.HasField("top_n") else count
        return Ranking(request.query, request.documents, top_n, request.return_documents, options)

    def batch(self, request: pb.RerankBatchRequest) -> bool:
        """Validate a batch as a whole; returns whether it is interactive.

        Its requests are validated one by one later, so that each fails alone.
        """
        count, limit = len(request.requests), self.limits.max_requests_per_batch
        if count == 0:
            raise invalid("requests", "there are none; give at least one request")
        if count > limit:
            raise invalid("requests", f"there are {count}; the limit of one batch is {limit}")
        pairs, limit = sum(len(one.documents) for one in request.requests), self.limits.max_pairs_per_batch
        if pairs > limit:
            raise invalid("requests", f"they hold {pairs} documents together; the limit of one batch is {limit}")
        violations = Violations()
        self._reply(request.requests, "requests", violations)
        _known_priority(request.priority, "priority", violations)
        violations.raise_if_any()
        return request.priority != pb.PRIORITY_BULK

    def open(self, message: pb.RerankStreamRequest) -> Opening:
        """Validate the first message of a stream. An error ends the stream."""
        kind = message.WhichOneof("message")
        if kind != "open":
            raise invalid(kind or "message", "came before open; the first message of a stream must be open")
        violations = Violations()
        options = self._options(message.open.options, "open.options", violations)
        _known_priority(message.open.priority, "open.priority", violations)
        progress = message.open.progress_seconds if message.open.HasField("progress_seconds") else None
        if progress is not None and not _LEAST_PROGRESS_SECONDS <= progress < math.inf:
            violations.add(
                "open.progress_seconds",
                f"is {progress:g}; give a finite number of seconds, at least {_LEAST_PROGRESS_SECONDS}, or none",
            )
        violations.raise_if_any()
        return Opening(options, message.open.priority == pb.PRIORITY_INTERACTIVE, progress)

    def texts(self, message: pb.StreamTexts, texts_before: int, bytes_before: int) -> tuple[list[str], int]:
        """Validate more texts of a stream; returns them and their size in bytes. An error ends the stream."""
        if not message.texts:
            raise invalid("texts.texts", "there are none; give at least one text")
        count, limit = texts_before + len(message.texts), self.limits.max_texts_per_stream
        if count > limit:
            raise invalid("texts.texts", f"the stream would hold {count} texts; the limit of one stream is {limit}")
        texts = list(message.texts)
        # Without a call a text: a message may hold more than a hundred thousand.
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        if max(sizes) > self.limits.max_text_bytes:
            violations = Violations()
            for position, text in enumerate(texts):
                self._text(text, f"texts.texts[{position}]", violations)
            violations.raise_if_any()
        added = sum(sizes)
        total, limit = bytes_before + added, self.limits.max_text_bytes_per_stream
        if total > limit:
            raise invalid("texts.texts", f"the stream would hold {total} bytes; the limit of one stream is {limit}")
        return texts, added

    def chunk_id(self, chunk_id: int, earlier: set[int]) -> None:
        """Validate the id of a chunk against the earlier ones. An error ends the stream."""
        if chunk_id in earlier:
            raise invalid("chunk.id", f"is {chunk_id}, as was an earlier chunk's; ids must differ within a stream")
        if len(earlier) >= self.limits.max_chunks_per_stream:
            raise invalid("chunk", f"is one more than {len(earlier)}, the limit of chunks in one stream")

    def cancel(self, message: pb.StreamCancel) -> None:
        """Validate the giving up of chunks. An error ends the stream."""
        if not message.chunk_ids:
            raise invalid("cancel.chunk_ids", "there are none; give at least one chunk id")

    def chunk(self, chunk: pb.StreamChunk, text_count: int) -> Pairs:
        """Validate the pairs of a chunk. An error fails only this chunk."""
        kind = chunk.WhichOneof("pairs")
        if kind is None:
            raise invalid("chunk.pairs", "is not set; give a grid or a list")
        source = chunk.grid if kind == "grid" else chunk.list
        path = f"chunk.{kind}"
        # Sizes are checked first, so that no array larger than the limit is built.
        rows, columns = len(source.query_ids), len(source.document_ids)
        violations = Violations()
        for name, size in (("query_ids", rows), ("document_ids", columns)):
            if size == 0:
                violations.add(f"{path}.{name}", "there are none; give at least one text id")
        if kind == "list" and rows != columns:
            violations.add(
                f"{path}.document_ids", f"there are {columns}, but {rows} query_ids; a list pairs them one by one"
            )
        violations.raise_if_any()
        count, limit = (rows * columns if kind == "grid" else rows), self.limits.max_pairs_per_chunk
        if count > limit:
            raise invalid(path, f"holds {count} pairs; the limit of one chunk is {limit}")
        queries = np.fromiter(source.query_ids, dtype=np.int64, count=rows)
        documents = np.fromiter(source.document_ids, dtype=np.int64, count=columns)
        for name, ids in (("query_ids", queries), ("document_ids", documents)):
            _known(ids, text_count, f"{path}.{name}", violations)
        violations.raise_if_any()
        return Pairs(queries, documents, grid=kind == "grid")

    def _options(self, options: pb.RerankOptions, path: str, violations: Violations) -> ScoringOptions:
        ranges = self._ranges
        instruction = ranges.default_instruction
        if options.HasField("instruction"):
            if ranges.supports_instruction:
                self._text(options.instruction, f"{path}.instruction", violations)
                instruction = options.instruction
            else:
                violations.add(f"{path}.instruction", "is set, but the served model takes none; leave it out")
        max_length = ranges.default_length
        if options.HasField("max_length"):
            max_length = options.max_length
            if not ranges.min_length <= max_length <= ranges.max_length:
                violations.add(
                    f"{path}.max_length",
                    f"is {max_length}; the served model takes {ranges.min_length} to {ranges.max_length} tokens",
                )
        if options.score_type not in pb.ScoreType.values():
            _unknown_enum(f"{path}.score_type", options.score_type, pb.ScoreType.keys(), violations)
        elif not ranges.has_probability and options.score_type != pb.SCORE_TYPE_RAW:
            violations.add(
                f"{path}.score_type",
                "the served model's scores are dot products of embeddings, for which no probability is defined; set "
                "SCORE_TYPE_RAW",
            )
        if options.over_long not in pb.OverLong.values():
            _unknown_enum(f"{path}.over_long", options.over_long, pb.OverLong.keys(), violations)
        return ScoringOptions(
            instruction,
            max_length,
            raw=options.score_type == pb.SCORE_TYPE_RAW,
            reject_over_long=options.over_long == pb.OVER_LONG_REJECT,
        )

    def _reply(self, requests: Sequence[pb.RerankRequest], path: str, violations: Violations) -> None:
        """Validate that the reply, which may return the documents, fits one message."""
        sizes = [request.ByteSize() for request in requests if request.return_documents]
        if not sizes:
            return
        pairs, limit = sum(len(request.documents) for request in requests), self.limits.max_message_bytes
        size = sum(sizes) + _RESULT_BYTES * pairs + _REPLY_BYTES * len(requests)
        if size > limit:
            violations.add(
                path,
                f"with the documents the reply may have {size} bytes; the limit of one message is {limit} "
                "(--limits.max-message-bytes): leave out return_documents, or send fewer documents",
            )

    def _text(self, text: str, path: str, violations: Violations) -> int:
        """Validate the size of one text; returns it in bytes."""
        size = _size(text)
        if size > self.limits.max_text_bytes:
            violations.add(path, f"is {size} bytes long; the limit of one text is {self.limits.max_text_bytes}")
        return size


def _size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _known(ids: NDArray[np.int64], text_count: int, path: str, violations: Violations) -> None:
    unknown = np.flatnonzero(ids >= text_count)
    if unknown.size:
        position = int(unknown[0])
        violations.add(
            f"{path}[{position}]", f"is text id {ids[position]}, but only {text_count} texts were sent before the chunk"
        )


def _known_priority(priority: int, path: str, violations: Violations) -> None:
    if priority not in pb.Priority.values():
        _unknown_enum(path, priority, pb.Priority.keys(), violations)


def _unknown_enum(path: str, value: int, names: Sequence[str], violations: Violations) -> None:
    violations.add(
        path, f"is {value}, which no {names[0].removesuffix('_UNSPECIFIED')} has; give one of {', '.join(names)}"
    )
