"""Prefix cache of the causal reranker: share of prompt tokens that it supplies, and speed gained by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import scrape
from benchmarks.bare import encode_grid, pair_layout
from benchmarks.bench import Bench
from benchmarks.launch import address_of
from benchmarks.report import Figure
from benchmarks.rounds import Spread, contest
from benchmarks.sides import StreamSide
from benchmarks.texts import Grid
from examples.processes import Child
from loss_client import RerankerClient
from reranker_service.models import read_model

_DOCUMENTS = 16
_PREFIX_TOKENS = 300
_SECONDS = 15.0


class IdealPrefixCache:
    """Prefix cache of unlimited size, which counts the tokens that a sequence shares with earlier ones.

    As in vLLM, prefixes are shared in whole blocks, and the last token of a prompt is always computed.

    Args:
        block: Tokens in a block.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._known: set[tuple[int, ...]] = set()

    def take(self, ids: tuple[int, ...]) -> int:
        """Return the number of tokens of a sequence that are cached, then add the sequence's whole blocks."""
        shared = 0
        for end in range(self._block, len(ids) + 1, self._block):
            if ids[:end] in self._known:
                shared = end if end < len(ids) else shared
            else:
                self._known.add(ids[:end])
        return shared


class CachingSide(StreamSide):
    """``RerankStream`` to a server with prefix caching; records the share of prompt tokens that were cached.

    Attributes:
        shares: Cached tokens / prompt tokens, one value a grid.
        possible: The same shares for an ideal prefix cache.
    """

    def __init__(self, name: str, process: Child, client: RerankerClient, model: Path) -> None:
        super().__init__(name, process, client)
        spec = read_model(str(model))
        self._layout, self._length = pair_layout(spec), spec.default_length
        self._counts = scrape.read(process)
        self.block = int(self._counts.labels["vllm:cache_config_info"]["block_size"])
        self._ideal = IdealPrefixCache(self.block)
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
        self.possible.append(sum(self._ideal.take(ids) for ids in prompts) / sum(map(len, prompts)))
        return seconds, scores


def prefix_cache(bench: Bench) -> list[Figure]:
    """Compare our server with and without prefix caching: 16 documents a query, a shared prefix of 300 tokens."""
    model = bench.models["causal"]
    characters = _characters(bench, model)

    def make_grid(queries: int) -> Grid:
        return Grid(bench.corpus.long(queries, characters), bench.corpus.grid(1, _DOCUMENTS).documents)

    start = bench.launcher.server
    with start(model, "vllm", scrape.FLAGS) as server, start(model, "vllm", enable_prefix_caching=False) as plain:
        with RerankerClient(address_of(server)) as client, RerankerClient(address_of(plain)) as other:
            caching = CachingSide("prefix cache", server, client, model)
            sides = [caching, StreamSide("without", plain, other)]
            found = contest(
                sides,
                make_grid,
                rounds=bench.rounds,
                seconds=_SECONDS * bench.scale,
                tolerance=bench.score_tolerance,
                say=bench.say,
            )
    # The first grid belongs to the warm-up round.
    shares, possible = caching.shares[1:], caching.possible[1:]
    of_possible = [share / most for share, most in zip(shares, possible, strict=True)]
    bench.say(
        f"blocks of {caching.block} tokens; share of prompt tokens cached: {Spread.of(shares).value:.3f}, "
        f"with an ideal cache: {Spread.of(possible).value:.3f}"
    )
    return [
        Figure("vllm, causal: prefix cache on / off", found.ratio("prefix cache", "without"), "x", 2.0),
        Figure("vllm, causal: cached tokens / what whole blocks allow", Spread.of(of_possible), "x", 0.99),
        Figure("vllm, causal: share of prompt tokens from the cache", Spread.of(shares), "of 1"),
        Figure("vllm, causal: stream", found.rate("prefix cache"), "pairs/s"),
    ]


def _characters(bench: Bench, model: Path) -> int:
    """Length of a query, in characters, for which template and query are a shared prefix of about 300 tokens."""
    layout = pair_layout(read_model(str(model)))

    def tokens(characters: int) -> float:
        queries = bench.corpus.long(8, characters)
        encoded = layout.encode_queries(queries, None)
        return float(np.mean([len(query.ids) for query in encoded]))

    few, many = tokens(100), tokens(1100)
    fixed = min(len(sequence.ids) for sequence in encode_grid(layout, ["a"], ["a"], 2048)) - tokens(1)
    return max(100, int(100 + (_PREFIX_TOKENS - fixed - few) * 1000 / (many - few)))
