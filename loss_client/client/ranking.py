"""RankedDocument: one document of a ranking, read from a reply."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loss_client.client.errors import ScoreError
from reranker.v1 import reranker_pb2 as pb


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: Its position in the list of documents that was ranked.
        score: Its relevance to the query; the range depends on the score type.
        document: Its text, if ``return_documents`` was set.
    """

    index: int
    score: float
    document: str | None = None


def read_ranking(response: pb.RerankResponse, documents: int) -> list[RankedDocument]:
    """Return the ranking of a reply, in the reply's order.

    Args:
        response: The reply.
        documents: Number of documents in the request.

    Raises:
        ScoreError: The reply names a document that was not in the request, or a score is not finite.
    """
    for result in response.results:
        if result.index >= documents or not np.isfinite(result.score):
            raise ScoreError(f"the server ranked document {result.index} of {documents} with the score {result.score}")
    return [
        RankedDocument(each.index, each.score, each.document if each.HasField("document") else None)
        for each in response.results
    ]
