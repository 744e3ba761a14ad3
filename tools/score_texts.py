"""Scores of a few texts from a server, as one JSON object: run with the client of any release.

python tools/score_texts.py ADDRESS
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import loss_client
from loss_client import RerankerClient, RerankerRequestError

QUERIES = ["parse a date", "naïve – text", "cosine of a number"]
DOCUMENTS = ["Parse a date from a string.", "Return cos(x).", "x" * 500, "Text with accents: déjà vu."]


def main(address: str) -> None:
    """Call every RPC of the server at this address through the client, and print the answers."""
    with RerankerClient(address) as client:
        info = client.model_info()
        ranking = client.rerank(QUERIES[0], DOCUMENTS)
        answers = {
            "client": metadata.version("reranker-grpc"),
            "package": str(Path(loss_client.__file__).parent),
            "model": info.model,
            "rerank": [[one.index, one.score] for one in sorted(ranking, key=lambda one: one.index)],
            "grid": client.score_grid(QUERIES, DOCUMENTS).tolist(),
            "pairs": client.score_pairs([(QUERIES[1], DOCUMENTS[2]), (QUERIES[2], DOCUMENTS[1])]).tolist(),
        }
        try:
            client.rerank(QUERIES[0], DOCUMENTS, max_length=10**6)
        except RerankerRequestError as error:
            answers["refused"] = [violation.field for violation in error.violations]
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
