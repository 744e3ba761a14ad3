"""Evaluation of a model by retrieval: nDCG@10 of each query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from loss_client.compare.intervals import ndcg
from loss_client.rows import Row, RowsError

_BATCH_TEXTS = 64


class RetrievalEvaluator(InformationRetrievalEvaluator):
    """``InformationRetrievalEvaluator`` that keeps the nDCG@10 of each query.

    Attributes:
        ndcg_by_query: nDCG@10 of the model that was evaluated last, in the order of ``queries``.
    """

    ndcg_by_query: Sequence[float] = ()

    def compute_metrics(self, queries_result_list: Any) -> dict[str, Any]:
        """Compute the metrics of the base class from the documents found for each query."""
        # The order of the base class: descending score, then ascending name.
        self.ndcg_by_query = [
            ndcg(
                [hit["corpus_id"] for hit in sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))],
                self.relevant_docs[query],
            )
            for query, hits in zip(self.queries_ids, queries_result_list, strict=True)
        ]
        found: dict[str, Any] = super().compute_metrics(queries_result_list)
        return found

    def means(self, model: SentenceTransformer) -> dict[str, float]:
        """Evaluate a model; return ``ndcg`` and ``mrr``, the means over the queries of nDCG@10 and MRR@10."""
        found = self(model)
        return {measure: found[f"{self.name}_cosine_{measure}@10"] for measure in ("ndcg", "mrr")}

    def by_query(self, model: SentenceTransformer) -> list[float]:
        """Evaluate a model; return nDCG@10 of each query, by the model's own similarity."""
        self(model)
        return list(self.ndcg_by_query)


def evaluator_of(rows: Iterable[Row], corpus: Iterable[Row] = ()) -> RetrievalEvaluator:
    """Make an evaluator of held-out rows.

    The first column of text is the query, the second a relevant document or a list of them. Further columns of text are
    documents that are not relevant to the query. All documents of all rows together are searched for every query.

    Args:
        rows: The rows. Rows with the same query are one query with all their relevant documents.
        corpus: More documents: all texts of these rows.

    Raises:
        RowsError: A row has no query or no document.
    """
    documents: dict[str, None] = {}
    relevant: defaultdict[str, set[str]] = defaultdict(set)
    for number, row in enumerate(rows, 1):
        query, *sides = [_texts(value) for value in row.values() if _texts(value)]
        if len(query) != 1 or not sides:
            raise RowsError(f"row {number} of the evaluation has to hold a query and then a relevant document")
        relevant[query[0]].update(sides[0])
        documents.update(dict.fromkeys(text for side in sides for text in side))
    if not relevant:
        raise RowsError("the evaluation has no rows")
    for row in corpus:
        documents.update(dict.fromkeys(text for value in row.values() for text in _texts(value)))
    return RetrievalEvaluator(
        queries={query: query for query in relevant},
        corpus={document: document for document in documents},
        relevant_docs=dict(relevant),
        ndcg_at_k=[10],
        mrr_at_k=[10],
        map_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        batch_size=_BATCH_TEXTS,
        write_csv=False,
        name="held-out",
    )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, (list, tuple)) else []
