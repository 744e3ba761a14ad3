"""Measurement of a server: a warm-up, then grids of growing size with new texts, until one takes long enough."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from loss_client.client.client import RerankerClient
from loss_client.client.errors import RerankerError
from loss_client.client.kinds import kind_name, raw_scale
from loss_client.plan.arithmetic import Speed
from loss_client.plan.texts import TextSource

_FIRST_PAIRS = 16
_MOST_PAIRS = 1 << 22
_LARGEST_GROWTH = 8
# Documents of a query, at least: engines with a prefix cache compute a query once for its neighbouring documents.
_DOCUMENTS_OF_QUERY = 16
# The last size is measured twice, and the jobs before it take a fraction of its time.
_SHARE_OF_LAST = 0.4
_LONG_ENOUGH = 0.3


@dataclass(frozen=True, slots=True)
class Measurement:
    """A server and its speed.

    Attributes:
        model: The model's name.
        kind: Its kind, such as ``"cross-encoder"``.
        engine: The engine and its number format.
        fingerprint: Fingerprint of the model and its engine.
        speed: The speed.
        chunk_pairs: Pairs of a chunk that the server prefers; 0 for no preference.
        pairs: Pairs of the measured jobs.
        seconds: Seconds of the measured jobs.
        tokens: Tokens that the model reads for one unit of the speed, a pair or a text, in the mean.
        truncated: Share of the pairs that were truncated to the length limit.
        ratio: Speed of the slower one of the two measured jobs over that of the other.
    """

    model: str
    kind: str
    engine: str
    fingerprint: str
    speed: Speed
    chunk_pairs: int
    pairs: int
    seconds: float
    tokens: float
    truncated: float
    ratio: float


@dataclass(frozen=True, slots=True)
class _Job:
    pairs: int
    texts: int
    scored: int
    tokens: int
    truncated: int
    seconds: float


def measure(
    client: RerankerClient, source: TextSource, seconds: float, max_length: int | None, timeout: float
) -> Measurement:
    """Measure the speed of a server.

    Args:
        client: The client.
        source: The texts.
        seconds: Seconds that the measurement takes, roughly; a job of a slow server may take longer.
        max_length: Longest input in tokens. None: the server's default.
        timeout: Most seconds to wait for the server's first answer.

    Raises:
        RerankerError: The server did not answer, or answered from its cache.
    """
    info = client.model_info(timeout)
    by_text = raw_scale(info) == "cosine"
    run = _Runner(client, source, max_length)
    run(_FIRST_PAIRS)  # the first job of a server may compile, allocate memory, and connect
    pairs, aim = 4 * _FIRST_PAIRS, _SHARE_OF_LAST * seconds
    last = run(pairs)
    while last.seconds < _LONG_ENOUGH * seconds and pairs < _MOST_PAIRS:
        # A grid of 2 n pairs of a bi-encoder has more new texts by a factor of the square root of 2.
        growth = (aim / last.seconds) ** (2 if by_text else 1)
        pairs = min(math.ceil(pairs * min(max(growth, 2), _LARGEST_GROWTH)), _MOST_PAIRS)
        last = run(pairs)
    jobs = [last, run(pairs)]
    units = [job.texts if by_text else job.scored for job in jobs]
    if not by_text and sum(units) < sum(job.pairs for job in jobs) / 2:
        raise RerankerError(
            f"the server scored {sum(units)} of {sum(job.pairs for job in jobs)} pairs and took the others from a "
            "cache: give more words, or a file with more rows"
        )
    rates = sorted(unit / job.seconds for unit, job in zip(units, jobs, strict=True))
    all_pairs, all_seconds = sum(job.pairs for job in jobs), sum(job.seconds for job in jobs)
    return Measurement(
        model=info.model,
        kind=kind_name(info),
        engine=f"{info.engine} {info.dtype}".strip(),
        fingerprint=info.fingerprint,
        speed=Speed(sum(units) / all_seconds, by_text),
        chunk_pairs=info.preferred_pairs_per_chunk,
        pairs=all_pairs,
        seconds=all_seconds,
        tokens=sum(job.tokens for job in jobs) / sum(units),
        truncated=sum(job.truncated for job in jobs) / all_pairs,
        ratio=rates[0] / rates[1],
    )


class _Runner:
    """Scores grids of new texts as the loss does, by streams of bulk priority."""

    def __init__(self, client: RerankerClient, source: TextSource, max_length: int | None) -> None:
        self._client, self._source, self._max_length = client, source, max_length

    def __call__(self, pairs: int) -> _Job:
        """Score a grid of about ``pairs`` pairs, and wait for it."""
        columns = max(_DOCUMENTS_OF_QUERY, math.isqrt(pairs))
        rows = max(1, round(pairs / columns))
        queries, documents = self._source.queries(rows), self._source.documents(columns)
        began = time.perf_counter()
        matrix = self._client.stream_grid(queries, documents, max_length=self._max_length)
        try:
            matrix.result()
        except BaseException:  # an interrupt as well: the server would go on
            matrix.cancel()
            raise
        seconds = time.perf_counter() - began
        usage = matrix.usage
        return _Job(
            pairs=usage.pairs,
            texts=rows + columns,
            scored=usage.pairs - usage.cached_pairs - usage.shared_pairs,
            tokens=usage.tokens,
            truncated=usage.truncated_pairs,
            seconds=seconds,
        )
