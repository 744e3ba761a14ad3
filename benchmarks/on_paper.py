"""Paper calculation of docs/scaling.md: what crosses the wire, and what each place holds, with measured constants.

python -m benchmarks.on_paper prints the page's two tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from loss_client.client.chunks import MOST_CHUNK_PAIRS, STREAM_CHUNK_PAIRS
from loss_client.plan.batch import Batch
from loss_client.plan.wire import Texts, wire_bytes

# Measured; the pages in brackets say how.
PAIRS_A_SECOND = 7_568  # ettin-150m on one H100, pairs of some 155 tokens (docs/gpu.md)
ROW_SECONDS = 0.73 / 256  # of a student of bge-base's shape on one H100, two columns (docs/gpu.md)
CHUNK_SECONDS = 0.4e-3  # processor time of the client (docs/loss-performance.md)
PAIR_SECONDS = 0.1e-6 + 0.05e-6  # of the client and of the loss, for each pair (docs/loss-performance.md)
TEXTS = Texts(query_bytes=61, document_bytes=618)  # docstrings (docs/cost.md)
SCORE_BYTES = 4
SERVER_PAIR_BYTES = 256  # that the server charges for a pair in flight (docs/serving.md)
ID_BYTES = 2 * 4  # of a listed pair in the client
GBIT = 1e9 / 8


@dataclass(frozen=True, slots=True)
class Fleet:
    """Trainer ranks and servers.

    Attributes:
        batch: Rows of the global batch.
        ranks: Trainer GPUs, each with a rank.
        servers: Reranker GPUs, each with a server.
        each: Servers that one rank uses.
        per_anchor: Pairs of an anchor; None for all pairs.
    """

    batch: int
    ranks: int
    servers: int
    each: int
    per_anchor: int | None

    @property
    def rows(self) -> int:
        """Anchors of a rank, each compared with the documents of all ranks."""
        return self.batch // self.ranks

    @property
    def pairs(self) -> int:
        """Pairs of a rank in a step."""
        return self.rows * (self.batch if self.per_anchor is None else self.per_anchor)

    @property
    def train_seconds(self) -> float:
        """T: seconds of a step without a reranker."""
        return self.rows * ROW_SECONDS

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, if scoring overlaps training and the servers are all busy."""
        return max(self.train_seconds, self.ranks * self.pairs / (self.servers * PAIRS_A_SECOND))

    @property
    def chunk_pairs(self) -> int:
        """Pairs of most chunks: they grow with the part of the job that one server gets."""
        return min(max(STREAM_CHUNK_PAIRS, self.pairs // self.each // 32), MOST_CHUNK_PAIRS)

    @property
    def chunks(self) -> int:
        """Chunks of a rank in a step."""
        return math.ceil(self.pairs / self.chunk_pairs)

    @property
    def copies(self) -> float:
        """Servers of a rank that get one of its documents, in the mean, if its pairs were spread at random."""
        pairs_a_document = self.pairs / self.batch
        if self.per_anchor is None:
            # A stream has columns of its own: some 2.2 of 8 servers got each document (docs/loss-performance.md).
            return min(self.each, max(1.0, 2.2 * math.sqrt(self.each / 8)))
        return self.each * (1 - (1 - 1 / self.each) ** pairs_a_document) if self.each > 1 else 1.0

    @property
    def text_bytes(self) -> float:
        """Bytes of text that a rank sends in a step."""
        queries = self.rows * min(self.each, self.pairs / self.rows) * TEXTS.query_bytes
        return queries + self.batch * self.copies * TEXTS.document_bytes

    @property
    def other_bytes(self) -> float:
        """Bytes of ids, scores and messages of a rank in a step, both directions together."""
        batch = Batch(self.rows, 2, ranks=1)
        listed = self.per_anchor is not None
        return wire_bytes(batch, Texts(0, 0), self.pairs if listed else self.rows**2, self.chunk_pairs, listed) * (
            1 if listed else self.pairs / self.rows**2
        )

    @property
    def messages(self) -> int:
        """Messages of a rank in a step: texts, chunk and reply, and the opening of its streams."""
        return 3 * self.chunks + 2 * min(self.each, self.chunks)

    @property
    def client_seconds(self) -> float:
        """Processor time of a trainer process for the scores of a step."""
        return self.chunks * CHUNK_SECONDS + self.pairs * PAIR_SECONDS

    @property
    def client_bytes(self) -> float:
        """Bytes of a trainer process: texts of the batch and the next one, and scores."""
        texts = 2 * self.batch * (TEXTS.query_bytes + TEXTS.document_bytes)
        return texts + self.pairs * (SCORE_BYTES + (0 if self.per_anchor is None else ID_BYTES))

    @property
    def ranks_of_server(self) -> float:
        """Ranks that use one server."""
        return self.ranks * self.each / self.servers

    @property
    def server_bytes(self) -> float:
        """Bytes that one server holds: texts of its streams, their token ids, and pairs in flight of half a second."""
        texts = self.ranks_of_server * self.text_bytes / self.each
        return 2 * texts + SERVER_PAIR_BYTES * PAIRS_A_SECOND / 2

    def rows_of_table(self) -> Iterator[tuple[str, str]]:
        """Yield (quantity, value)."""
        step = self.step_seconds
        yield "pairs of a step, all ranks", f"{self.ranks * self.pairs:,}"
        yield "T, a step without a reranker", f"{self.train_seconds:.2f} s"
        yield "a step", f"{step:,.2f} s"
        yield (
            "connections: of a rank, of a server, all",
            (f"{self.each}, {self.ranks_of_server:g}, {self.ranks * self.each:,}"),
        )
        yield "messages of a rank: a step, a second", f"{self.messages:,}, {self.messages / step:,.0f}"
        of_server = self.messages * self.ranks / self.servers
        yield "messages of a server: a step, a second", f"{of_server:,.0f}, {of_server / step:,.0f}"
        yield "text bytes of a rank, a step", _bytes(self.text_bytes)
        yield "other bytes of a rank, a step", _bytes(self.other_bytes)
        rate = (self.text_bytes + self.other_bytes) / step
        yield (
            "network: of a rank, of a server",
            (f"{rate / GBIT:.3f} Gbit/s, {rate * self.ranks / self.servers / GBIT:.4f} Gbit/s"),
        )
        share = self.client_seconds / step
        yield "trainer: processor time for scores, a step", f"{self.client_seconds:.2f} s ({share:.1%} of a core)"
        yield "trainer: memory for texts and scores", _bytes(self.client_bytes)
        yield "server: memory for texts and pairs", _bytes(self.server_bytes)


def _bytes(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:.0f} B"


FLEETS = {
    "all pairs": Fleet(65_536, 64, 512, 512, None),
    "172 an anchor, all servers": Fleet(65_536, 64, 512, 512, 172),
    "172 an anchor, 8 servers a rank": Fleet(65_536, 64, 512, 8, 172),
}
"""The fleets of the first table: 172 pairs an anchor take as long as a training step."""


def table() -> str:
    """The first table of docs/scaling.md."""
    columns = [dict(fleet.rows_of_table()) for fleet in FLEETS.values()]
    lines = [f"| | {' | '.join(FLEETS)} |", f"|---|{'---:|' * len(FLEETS)}"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join(lines)


def ranks_table() -> str:
    """The second table of docs/scaling.md: the work of one rank as ranks are added at a fixed global batch."""
    lines = [
        "| ranks | rows a rank | pairs a rank, all | pairs a rank, 172 an anchor | texts a rank gathers "
        "| text bytes a rank sends (8 servers a rank) | all ranks together |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for ranks in (8, 16, 64, 128, 512):
        fleet = Fleet(65_536, ranks, 512, 8, 172)
        sent = fleet.text_bytes
        lines.append(
            f"| {ranks} | {fleet.rows:,} | {fleet.rows * fleet.batch:,} | {fleet.pairs:,} | {2 * fleet.batch:,} "
            f"| {_bytes(sent)} | {_bytes(ranks * sent)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), ranks_table(), sep="\n\n")
