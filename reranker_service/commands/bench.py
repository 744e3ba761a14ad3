"""Command ``reranker-service bench``: measures a running server from a client's side for a few seconds."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from reranker.v1 import reranker_pb2 as pb

from .access import Access, AccessError, add_arguments
from .load import GRID_SIDE, Load, LoadError, Meter
from .texts import NewTexts

_ANSWER_SECONDS = 10.0
_DOCUMENTS = 8
_USUAL_CHUNK_PAIRS = 128
# Without a chunk size that fits the server, a slow one would answer once or twice in the whole measurement.
_CHUNK_SECONDS = 0.1
_IN_FLIGHT = 4096
_IN_FLIGHT_CHUNKS = 32
_KINDS = {
    pb.MODEL_KIND_CROSS_ENCODER: "cross-encoder",
    pb.MODEL_KIND_CAUSAL_RERANKER: "causal reranker",
    pb.MODEL_KIND_BI_ENCODER: "bi-encoder",
}

DESCRIPTION = f"""\
Measure a running server from a client's side: the latency of Rerank with {_DOCUMENTS} documents on its own, the pairs
per second of a stream, and the latency beside that stream. Texts are new in each run, so that no cache answers.

  reranker-service bench localhost:50051
  reranker-service bench grpcs://gpu1:50051 --tls-ca ca.pem --token-file token --document-words 300 --seconds 20
  reranker-service bench gpu1:50051 --texts passages.txt --json
"""


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of calls, in milliseconds.

    Attributes:
        p50: Median.
        p95: 95th percentile.
        calls: Number of calls.
    """

    p50: float
    p95: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Compute the percentiles of the seconds of each call."""
        p50, p95 = np.percentile(seconds, [50, 95])
        return cls(1000 * float(p50), 1000 * float(p95), len(seconds))

    def __str__(self) -> str:
        return f"p50 {self.p50:,.1f} ms, p95 {self.p95:,.1f} ms ({self.calls} calls)"


@dataclass(frozen=True, slots=True)
class Report:
    """Measurement of a server.

    Attributes:
        address: The server.
        model: The model's name.
        kind: Its kind.
        engine: The engine.
        dtype: Its number format.
        pairs_per_second: Pairs of the streams per second.
        pairs: Pairs of the streams.
        streams: Streams at a time.
        chunk_pairs: Most pairs of a chunk.
        tokens_per_pair: Tokens that the model read, over the pairs.
        cached_share: Share of the pairs that the model did not score, in [0, 1].
        truncated_share: Share of the pairs that were truncated to the length limit, in [0, 1].
        alone: Latency of ``Rerank`` without other load.
        beside: Latency of ``Rerank`` beside the streams.
    """

    address: str
    model: str
    kind: str
    engine: str
    dtype: str
    pairs_per_second: float
    pairs: int
    streams: int
    chunk_pairs: int
    tokens_per_pair: float
    cached_share: float
    truncated_share: float
    alone: Latency
    beside: Latency

    def __str__(self) -> str:
        streams = "stream " if self.streams == 1 else "streams"
        shares = [
            f"; {share:.1%} of the pairs {what}"
            for share, what in ((self.cached_share, "came from a cache"), (self.truncated_share, "were truncated"))
            if share >= 0.001
        ]
        several = "" if self.streams == 1 else f"{self.streams} streams, "
        return "\n".join(
            (
                f"server   {self.address}: {self.model}, a {self.kind}, on {self.engine} {self.dtype}",
                f"latency  Rerank with {_DOCUMENTS} documents, alone: {self.alone}",
                f"{streams}  {self.pairs_per_second:,.0f} pairs/s: {several}{self.pairs:,} pairs, "
                f"{self.tokens_per_pair:.0f} tokens a pair, chunks of {self.chunk_pairs}{''.join(shares)}",
                f"latency  Rerank with {_DOCUMENTS} documents, beside the {streams.strip()}: {self.beside}",
            )
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a server and print the figures.

    Args:
        arguments: Arguments of the command line, without the word "bench"; ``None`` for those of this process.

    Returns:
        0 after a measurement, 1 if the server failed. Wrong arguments exit with 2.
    """
    parser = argparse.ArgumentParser(
        prog="reranker-service bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", help="HOST:PORT of the server; grpcs://HOST:PORT for TLS")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds to measure, about; default: 6")
    parser.add_argument("--query-words", type=int, default=10, metavar="N", help="words of a query; default: 10")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--document-words", type=int, default=100, metavar="N", help="words of a document; default: 100")
    texts.add_argument("--texts", type=Path, metavar="FILE", help="text file, a document on each line, instead")
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="longest input, in tokens; default: the server's own limit"
    )
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="streams at a time; default: 1")
    parser.add_argument(
        "--chunk-pairs",
        type=int,
        metavar="N",
        help=f"most pairs of a chunk; default: as many as take {_CHUNK_SECONDS:g} s, at most the number that the "
        f"server prefers, or {_USUAL_CHUNK_PAIRS}",
    )
    parser.add_argument(
        "--in-flight",
        type=int,
        metavar="N",
        help=f"most pairs of a stream that are sent and not answered; default: {_IN_FLIGHT_CHUNKS} chunks, at most "
        f"{_IN_FLIGHT}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    for name in ("seconds", "query_words", "document_words", "max_length", "streams", "chunk_pairs", "in_flight"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it has to be above 0")
    try:
        lines = [] if options.texts is None else _lines(options.texts)
        access = Access.of(options)
        report = asyncio.run(_measure(options, access, NewTexts(options.query_words, options.document_words, lines)))
    except AccessError as error:
        parser.error(str(error))
    except LoadError as error:
        print(f"reranker-service bench: {options.address}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(report), indent=2) if options.json else report)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"--texts {path} cannot be read as UTF-8 text: {error}") from None
    if not found:
        raise AccessError(f"--texts {path} holds no text: it has to have a document on each line")
    return found


async def _measure(options: argparse.Namespace, access: Access, texts: NewTexts) -> Report:
    async with access.channel(options.address) as channel:
        load = Load(channel, access, texts, options.max_length)
        info = await load.info(_ANSWER_SECONDS)
        documents = min(_DOCUMENTS, info.limits.max_documents_per_request)
        await load.rank(documents, 0.0)  # the first calls may compile and allocate memory
        alone = await load.rank(documents, options.seconds / 4)
        fitting = max(documents, int(documents * _CHUNK_SECONDS / float(np.median(alone))))
        chunk_pairs = options.chunk_pairs or min(fitting, info.preferred_pairs_per_chunk or _USUAL_CHUNK_PAIRS)
        # A grid is cut into chunks of whole rows, so that no chunk has more pairs than a grid.
        chunk_pairs = min(chunk_pairs, info.limits.max_pairs_per_chunk, GRID_SIDE**2)
        in_flight = options.in_flight or min(_IN_FLIGHT, _IN_FLIGHT_CHUNKS * chunk_pairs)
        meter = Meter()
        await _streams(load, meter, info, chunk_pairs, in_flight, options, asyncio.sleep(options.seconds / 2))
        beside: list[float] = []

        async def rank() -> None:
            beside.extend(await load.rank(documents, options.seconds / 4))

        await _streams(load, Meter(), info, chunk_pairs, in_flight, options, rank())
    return Report(
        address=options.address,
        model=info.model,
        kind=_KINDS.get(info.kind, "reranker"),
        engine=info.engine,
        dtype=info.dtype,
        pairs_per_second=meter.rate,
        pairs=meter.pairs,
        streams=options.streams,
        chunk_pairs=chunk_pairs,
        tokens_per_pair=meter.tokens / max(meter.pairs, 1),
        cached_share=meter.cached / max(meter.pairs, 1),
        truncated_share=meter.truncated / max(meter.pairs, 1),
        alone=Latency.of(alone),
        beside=Latency.of(beside),
    )


async def _streams(
    load: Load,
    meter: Meter,
    info: pb.GetModelInfoResponse,
    chunk_pairs: int,
    in_flight: int,
    options: argparse.Namespace,
    work: Coroutine[None, None, None],
) -> None:
    """Run the streams while ``work`` runs, and until there are results to measure.

    Raises:
        LoadError: A stream failed.
    """
    try:
        async with asyncio.TaskGroup() as group:
            streams = [
                group.create_task(load.stream(meter, info, chunk_pairs, in_flight)) for _ in range(options.streams)
            ]
            await work
            await meter.enough.wait()
            for stream in streams:
                stream.cancel()
    except* LoadError as failed:
        raise next(iter(failed.exceptions)) from None
