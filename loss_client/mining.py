"""Mining of hard negatives with the candidates of thousands of queries scored in one stream.

sentence-transformers' ``mine_hard_negatives`` calls its cross-encoder once for every query and waits for the answer.
The service then has the candidates of one query at a time: too few to fill a GPU, and work for one server only.
:func:`mine_hard_negatives` runs the function twice. The first run notes the candidates and stops before it uses scores.
Then the service scores the candidates, those of many queries in one stream. The second run takes these scores. The
embeddings of the first run are kept on disk for the second; only the search is repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from sentence_transformers import util
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData
from torch import Tensor

from loss_client.cross_encoder import RemoteCrossEncoder

_PAIRS_AT_ONCE = 2**18

Pairs = Sequence[tuple[str, str]]


class _NotedAllError(Exception):
    """Ends the first run."""


class _Candidates:
    """A cross-encoder that notes the candidates of each query, and later gives their scores.

    Args:
        queries: Number of different queries. The call after theirs has the positives.
    """

    num_labels = 1

    def __init__(self, queries: int) -> None:
        self.model_card_data = CrossEncoderModelCardData()
        self._queries = queries
        self._calls: list[Pairs] = []
        self._scores: list[Tensor] = []
        self._given = 0

    def predict(self, inputs: Pairs, **_: Any) -> Tensor:
        """Note the pairs, or give the scores of the next call.

        Raises:
            _NotedAllError: The last call of the first run was noted.
            RuntimeError: The second run has other candidates than the first.
        """
        if not self._scores:
            self._calls.append(inputs)
            if len(self._calls) > self._queries:
                raise _NotedAllError
            return torch.zeros(len(inputs))
        if self._given == len(self._calls) or list(self._calls[self._given]) != list(inputs):
            raise RuntimeError(
                "the second search found other candidates than the first; use sentence-transformers' function"
            )
        self._given += 1
        return self._scores[self._given - 1]

    def score(self, cross_encoder: RemoteCrossEncoder, show_progress_bar: bool | None) -> None:
        """Score all noted pairs, in streams of about a quarter of a million."""
        begin = 0
        while begin < len(self._calls):
            end = begin
            pairs: list[tuple[str, str]] = []
            while end < len(self._calls) and len(pairs) < _PAIRS_AT_ONCE:
                pairs += self._calls[end]
                end += 1
            scores = cross_encoder.predict(pairs, convert_to_tensor=True, show_progress_bar=show_progress_bar)
            self._scores += scores.split([len(call) for call in self._calls[begin:end]])
            begin = end

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> dict[str, Any]:
        """Return a pool without processes."""
        return {"input": None, "output": None, "processes": []}

    def stop_multi_process_pool(self, pool: dict[str, Any]) -> None:
        """Return at once, because the pool has no processes."""


def mine_hard_negatives(
    dataset: Any,
    model: Any,
    *,
    cross_encoder: RemoteCrossEncoder,
    anchor_column_name: str | None = None,
    cache_folder: str | None = None,
    show_progress_bar: bool | None = None,
    **options: Any,
) -> Any:
    """Mine as ``sentence_transformers.util.mine_hard_negatives`` does, with the scores of a service in few streams.

    Args:
        dataset: A ``datasets.Dataset`` with the columns anchor and positive.
        model: Embedding model that finds candidates.
        cross_encoder: The service that scores the candidates.
        anchor_column_name: Name of the anchor's column. Default: the first column.
        cache_folder: Directory in which embeddings stay. Default: a temporary one.
        show_progress_bar: See ``RemoteCrossEncoder.predict``; one bar for each stream.
        options: All other options of the library's function, by name.

    The noted pairs take some 70 bytes each in memory, texts not included: 3 GB for a million queries of 40 candidates.

    Returns:
        The result of the library's function.

    Raises:
        RerankerError: The service could not be used.
        RuntimeError: The second search found other candidates than the first, as searches on several threads may.
        ValueError: No margin and no minimum or maximum score is given. The library would not use the cross-encoder.
    """
    bounds = ("absolute_margin", "relative_margin", "max_score", "min_score", "margin")
    if all(options.get(name) is None for name in bounds):
        raise ValueError(
            "mine_hard_negatives uses a cross-encoder only with a margin or a minimum or maximum score: give one of "
            f"{', '.join(bounds[:-1])}, or mine with sentence-transformers' function and without the cross-encoder"
        )
    anchors = dataset[anchor_column_name or dataset.column_names[0]]
    candidates: Any = _Candidates(len(set(anchors)))  # not a CrossEncoder for a type checker
    with ExitStack() as stack:
        options["cache_folder"] = cache_folder or stack.enter_context(tempfile.TemporaryDirectory())
        options["anchor_column_name"] = anchor_column_name
        try:
            util.mine_hard_negatives(dataset, model, cross_encoder=candidates, **{**options, "verbose": False})
        except _NotedAllError:
            candidates.score(cross_encoder, show_progress_bar)
        return util.mine_hard_negatives(dataset, model, cross_encoder=candidates, **options)
