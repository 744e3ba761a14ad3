"""Fleet: jobs of several trainer ranks at addresses behind which any servers are, timed, with every score checked."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chaos.ledger import Ledger
from chaos.scores import raw_scores, texts_of
from loss_client import RerankerClient, RerankerError

_numbers = itertools.count(1)
_NUMBERS_A_JOB = 1 << 15


def run_grid(client: RerankerClient, ledger: Ledger, pairs: float, chunk_pairs: int | None = None) -> None:
    """Score a grid of about ``pairs`` pairs that no cache knows, and count its scores."""
    side = max(int(pairs**0.5), 1)
    first = next(_numbers) * _NUMBERS_A_JOB
    queries = np.arange(first, first + side)
    documents = queries + _NUMBERS_A_JOB // 2
    right: NDArray[np.float32] = raw_scores(queries[:, None], documents[None, :], 0)
    matrix = client.stream_grid(texts_of(queries), texts_of(documents), score_type="raw", chunk_pairs=chunk_pairs)
    try:
        matrix.result()
    except RerankerError as error:
        ledger.error(error)
    ledger.job(matrix, right)


def pairs_per_second(
    address: str | Sequence[str], ranks: int, pairs: float, ledger: Ledger, chunk_pairs: int | None = None
) -> float:
    """Return the pairs that are scored in a second for all ranks together.

    Args:
        address: Addresses of each rank's client.
        ranks: Number of ranks, each with a client and one job.
        pairs: Pairs of each job.
        ledger: Gets the counts.
        chunk_pairs: See ``RerankerClient.stream_grid``.
    """
    clients = [RerankerClient(address, timeout=120) for _ in range(ranks)]
    try:
        for client in clients:
            run_grid(client, ledger, 64)  # connections, and the model's fingerprint
        threads = [threading.Thread(target=run_grid, args=(client, ledger, pairs, chunk_pairs)) for client in clients]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ranks * int(pairs**0.5) ** 2 / (time.perf_counter() - begun)
    finally:
        for client in clients:
            client.close()
