"""The causal reranker: how much of its prompts comes from the prefix cache, and what that is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import scrape
from benchmarks.bare import encode_grid, pair_layout
from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.processes import Child
from benchmarks.report import Figure
from benchmarks.rounds import Spread, contest
from benchmarks.sides import StreamSide
from benchmarks.texts import Grid
from loss_client import RerankerClient
from reranker_service.models import read_model

_DOCUMENTS = 16
_PREFIX_TOKENS = 300
_SECONDS = 15.0


class WholeBlocks:
    """A prefix cache without limits: what a sequence has in common with earlier ones, in whole blocks.

    vLLM computes at least one token of every prompt, so a prompt's last token is never taken from the cache.

    Args:
        block: Tokens of a block.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._known: set[tuple[int, ...]] = set()

    def take(self, ids: tuple[int, ...]) -> int:
        """How many tokens of a sequence are known; from now on, all of its whole blocks are."""
        shared = 0
        for end in range(self._block, len(ids) + 1, self._block):
            if ids[:end] in self._known:
                shared = end if end < len(ids) else shared
            else:
                self._known.add(ids[:end])
        return shared


class CachingSide(StreamSide):
    """Our stream to a server with prefix caching, which notes what share of the prompt tokens was cached.

    Attributes:
        shares: For each grid so far, cached tokens / prompt tokens.
        possible: The same if every whole block that was there before had been found.
    """

    def __init__(self, name: str, process: Child, client: RerankerClient, model: Path) -> None:
        super().__init__(name, process, client)
        spec = read_model(str(model))
        self._layout, self._length = pair_layout(spec), spec.default_length
        self._counts = scrape.read(process)
        self.block = int(self._counts.labels["vllm:cache_config_info"]["block_size"])
        self._blocks = WholeBlocks(self.block)
        self.shares: list[float] = []
        self.possible: list[float] = []

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        """See ``Side.score``."""
        seconds, scores = super().score(grid)
        earlier, self._counts = self._counts, scrape.read(self._process)
        found = self._counts.since(earlier).totals
        self.shares.append(found["vllm:prefix_cache_hits_total"] / found["vllm:prefix_cache_queries_total"])
        sequences = encode_grid(self._layout, list(grid.queries), list(grid.documents), self._length)
        prompts = [tuple(sequence.ids.tolist()) for sequence in sequences]
        self.possible.append(sum(self._blocks.take(ids) for ids in prompts) / sum(map(len, prompts)))
        return seconds, scores


def prefix_cache(bench: Bench) -> list[Figure]:
    """Our server with prefix caching against the same without; 16 documents a query, a prefix of 300 tokens."""
    model = bench.models["causal"]
    characters = _characters(bench, model)

    def make_grid(queries: int) -> Grid:
        return Grid(bench.corpus.long(queries, characters), bench.corpus.grid(1, _DOCUMENTS).documents)

    start = bench.launcher.server
    with start(model, "vllm", scrape.FLAGS) as server, start(model, "vllm", enable_prefix_caching=False) as plain:
        with RerankerClient(address_of(server)) as client, RerankerClient(address_of(plain)) as other:
            caching = CachingSide("prefix cache", server, client, model)
            sides = [caching, StreamSide("without", plain, other)]
            tolerance = 0.02 if bench.launcher.machine.dtype == "float32" else 0.5
            found = contest(
                sides,
                make_grid,
                rounds=bench.rounds,
                seconds=_SECONDS * bench.scale,
                tolerance=tolerance,
                say=bench.say,
            )
    # The first grid was to warm up.
    shares, possible = caching.shares[1:], caching.possible[1:]
    of_possible = [share / most for share, most in zip(shares, possible, strict=True)]
    bench.say(
        f"blocks of {caching.block} tokens; cached {Spread.of(shares).value:.3f} of the prompt tokens, "
        f"possible {Spread.of(possible).value:.3f}"
    )
    return [
        Figure("vllm, causal: prefix cache on / off", found.ratio("prefix cache", "without"), "x", 2.0),
        Figure("vllm, causal: cached tokens / what whole blocks allow", Spread.of(of_possible), "x", 0.99),
        Figure("vllm, causal: share of prompt tokens from the cache", Spread.of(shares), "of 1"),
        Figure("vllm, causal: stream", found.rate("prefix cache"), "pairs/s"),
    ]


def _characters(bench: Bench, model: Path) -> int:
    """Characters of a query that make a shared prefix of about 300 tokens, template included."""
    layout = pair_layout(read_model(str(model)))

    def tokens(characters: int) -> float:
        queries = bench.corpus.long(8, characters)
        encoded = layout.encode_queries(queries, None)
        return float(np.mean([len(query.ids) for query in encoded]))

    few, many = tokens(100), tokens(1100)
    fixed = min(len(sequence.ids) for sequence in encode_grid(layout, ["a"], ["a"], 2048)) - tokens(1)
    return max(100, int(100 + (_PREFIX_TOKENS - fixed - few) * 1000 / (many - few)))
