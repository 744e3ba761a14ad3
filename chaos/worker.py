"""Fault: vLLM's worker process is killed; its server then ends, and is started again."""

from __future__ import annotations

import importlib.util
import itertools
import threading

from chaos.ledger import Ledger
from chaos.run import Run, SkippedError
from chaos.servers import VllmServer
from loss_client import RerankerClient, RerankerError
from tests.models import build_bert_cross_encoder, docstrings
from tests.references import cross_encoder_logits

_KILLS = 3
_SIDE = 64  # vLLM scores some thousand pairs a second on two cores
_CHUNK_PAIRS = 128
_TOLERANCE = 2e-3
_TIMEOUT_SECONDS = 300.0  # longer than a start
_DOCUMENT_CHARACTERS = 120


def killed_workers(run: Run) -> None:
    """Kill vLLM's worker during jobs whose right scores transformers computed before."""
    if importlib.util.find_spec("vllm") is None:
        raise SkippedError("vLLM is not installed")
    run.injections.wanted, run.injections.seconds = _KILLS, _KILLS * _TIMEOUT_SECONDS
    model = build_bert_cross_encoder(run.directory / "cross-encoder")
    texts = list(dict.fromkeys(" ".join(text.split())[:_DOCUMENT_CHARACTERS] for text in docstrings()))
    queries, documents = texts[:_SIDE], texts[_SIDE : 2 * _SIDE]
    right = cross_encoder_logits(model, list(itertools.product(queries, documents)), None).reshape(_SIDE, _SIDE)
    ending = threading.Event()

    def ask(client: RerankerClient, ledger: Ledger) -> None:
        while not ending.is_set():
            matrix = client.stream_grid(queries, documents, score_type="raw", chunk_pairs=_CHUNK_PAIRS)
            try:
                matrix.result()
            except RerankerError as error:
                ledger.error(error)
            ledger.job(matrix, right, _TOLERANCE)

    # Without the cache, which would answer all jobs but the first.
    with VllmServer(model, run.directory, "--cache-bytes", "0") as server:
        server.wait_ready()
        with run.client([server], timeout=_TIMEOUT_SECONDS) as client:
            asking = threading.Thread(target=ask, args=(client, run.ledger), daemon=True)
            asking.start()
            try:
                for _ in run.injections:
                    run.pause(1.0, 3.0)
                    for worker in server.workers:
                        worker.kill()
                    if server.wait_end() != 1:
                        run.ledger.error("the server did not end with status 1 after its worker was killed")
                    server.start()
                    server.wait_ready()
                run.pause(1.0, 3.0)
            finally:
                ending.set()
                asking.join(_TIMEOUT_SECONDS)
