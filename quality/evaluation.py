"""Evaluation of a student: nDCG@10 and MRR@10, and nDCG@10 of every query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from examples.docstrings import Pair
from examples.student import retrieval_evaluator
from quality.intervals import pack

_CUT = 10


class ByQueryEvaluator(InformationRetrievalEvaluator):
    """Evaluator of sentence-transformers that also keeps nDCG@10 of every query.

    Args:
        base: Evaluator with the same queries, documents and relevance.

    Attributes:
        ndcg_by_query: nDCG@10 of each query in the latest evaluation, in the order of ``queries_ids``.
    """

    def __init__(self, base: InformationRetrievalEvaluator) -> None:
        super().__init__(
            queries=dict(zip(base.queries_ids, base.queries, strict=True)),
            corpus=dict(zip(base.corpus_ids, base.corpus, strict=True)),
            relevant_docs=base.relevant_docs,
            ndcg_at_k=[_CUT],
            mrr_at_k=[_CUT],
            map_at_k=[_CUT],
            accuracy_at_k=[1],
            precision_recall_at_k=[_CUT],
            batch_size=base.batch_size,
            write_csv=False,
            name=base.name,
        )
        self.ndcg_by_query: list[float] = []

    def compute_metrics(self, queries_result_list: list[Any]) -> Any:
        """Compute the metrics of the base class from the hits of each query, best first."""
        self.ndcg_by_query = []
        for query, hits in zip(self.queries_ids, queries_result_list, strict=True):
            relevant = self.relevant_docs[query]
            found = [float(hit["corpus_id"] in relevant) for hit in hits[:_CUT]]
            best = self.compute_dcg_at_k([1.0] * len(relevant), _CUT)
            self.ndcg_by_query.append(self.compute_dcg_at_k(found, _CUT) / best)
        return super().compute_metrics(queries_result_list)


def evaluator(pairs: Sequence[Pair], queries: int) -> ByQueryEvaluator:
    """Make the evaluator for held-out pairs, with at most ``queries`` queries."""
    return ByQueryEvaluator(retrieval_evaluator(pairs, queries, seed=0))


def evaluate(evaluator: ByQueryEvaluator, model: SentenceTransformer) -> dict[str, Any]:
    """Return ``ndcg`` and ``mrr``, means over the queries, and ``by_query``, which is nDCG@10 of each query, packed."""
    found = evaluator(model)
    means = {measure: found[f"{evaluator.name}_cosine_{measure}@{_CUT}"] for measure in ("ndcg", "mrr")}
    return {**means, "by_query": pack(evaluator.ndcg_by_query)}
