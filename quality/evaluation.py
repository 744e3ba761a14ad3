"""Evaluation of a student: nDCG@10 and MRR@10, and nDCG@10 of every query."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer

from loss_client.compare.evaluation import RetrievalEvaluator
from quality.intervals import pack


def evaluate(evaluator: RetrievalEvaluator, model: SentenceTransformer) -> dict[str, Any]:
    """Return ``ndcg`` and ``mrr``, means over the queries, and ``by_query``, which is nDCG@10 of each query, packed."""
    return {**evaluator.means(model), "by_query": pack(evaluator.ndcg_by_query)}
