"""Fixtures of the loss's tests: small students and guides, batches of real text, and a scorer in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn

from loss_client.client.scores import RawScale, ScoreUsage

from .models import build_bi_encoder, summary_and_body

Score = Callable[[Sequence[str], Sequence[str]], NDArray[np.float32]]


def student(directory: Path, seed: int = 0) -> SentenceTransformer:
    """Return a small model in training mode, with dropout; equal seeds give equal models."""
    return SentenceTransformer(str(build_bi_encoder(directory / f"student-{seed}", seed)), device="cpu").train()


def guide(directory: Path, seed: int = 7) -> SentenceTransformer:
    """Return a small bi-encoder with centred embeddings, whose cosines have both signs."""
    path = build_bi_encoder(directory / f"guide-{seed}", seed, normalize=False)
    model = SentenceTransformer(str(path), device="cpu").eval()
    mean = torch.from_numpy(model.encode([text for column in texts(2, 32) for text in column])).mean(0)
    centre = Dense(len(mean), len(mean), activation_function=nn.Identity())
    with torch.no_grad():
        centre.linear.weight.copy_(torch.eye(len(mean)))
        centre.linear.bias.copy_(-mean)
    model.append(centre)
    return model.eval()


def texts(columns: int, rows: int) -> list[list[str]]:
    """Return columns of distinct real texts of one line: anchors, positives, then other bodies as negatives."""
    pairs: dict[str, str] = {}
    for summary, body in summary_and_body():
        line = " ".join(body.split())[:120]
        if line not in pairs.values():
            pairs.setdefault(summary, line)
    chosen = list(islice(pairs.items(), rows * (columns - 1)))
    assert len(chosen) == rows * (columns - 1), "not enough docstrings"
    anchors = [summary for summary, _ in chosen[:rows]]
    bodies = [body for _, body in chosen]
    return [anchors, *(bodies[start : start + rows] for start in range(0, len(bodies), rows))]


def dataset(columns: int, rows: int) -> Dataset:
    """Return the same texts as a dataset: ``anchor``, ``positive``, ``negative_1``, and so on."""
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, columns - 1))]
    return Dataset.from_dict(dict(zip(names, texts(columns, rows), strict=True)))


def features(model: SentenceTransformer, columns: Sequence[Sequence[str]], raw: bool = True) -> list[dict[str, Any]]:
    """Return columns as the trainer passes them to a loss, with the raw texts if ``raw``."""
    prepared = [model.preprocess(list(column)) for column in columns]
    return [{**one, "raw_text": list(column)} if raw else one for one, column in zip(prepared, columns, strict=True)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient of a model, by parameter name."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def loss_and_gradients(loss: nn.Module, batch: list[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Run one step from zeroed gradients."""
    loss.zero_grad()
    value = loss(batch, None)
    value.backward()
    return float(value.detach()), gradients(loss.get_submodule("model"))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Assert that gradients are equal up to ``tolerance``, as a share of the largest entry of all gradients."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        difference = float((found[name] - value).abs().max())
        assert difference <= tolerance * max(scale, 1e-3), f"{name}: {difference} apart, of {scale}"


def cosines_of(model: SentenceTransformer) -> Score:
    """Return a function that scores pairs by the cosine of a model's embeddings."""

    def score(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        with torch.no_grad():
            sides = [model(model.preprocess(list(side)))["sentence_embedding"] for side in (queries, documents)]
            similar = nn.functional.cosine_similarity(sides[0][:, None], sides[1][None], dim=-1)
        return np.asarray(similar, dtype=np.float32)

    return score


def random_scores(seed: int = 0) -> Score:
    """Return a function that scores pairs of texts in [-1, 1], at random but always with the same score for a pair."""

    def one(query: str, document: str) -> float:
        digest = blake2b(repr((seed, query, document)).encode(), digest_size=6).digest()
        return int.from_bytes(digest) / 2**47 - 1

    def score(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[one(query, document) for document in documents] for query in queries], dtype=np.float32)

    return score


@dataclass
class MemoryScores:
    """One scoring job whose rows are all complete; records how it was read."""

    queries: list[str]
    documents: list[str]
    options: dict[str, Any]
    values: NDArray[np.float32]
    reads: list[tuple[int, int]] = field(default_factory=list)
    released: list[tuple[int, int]] = field(default_factory=list)
    cancelled: bool = False
    wait_seconds: float = 0.0
    error: Exception | None = None
    usage: ScoreUsage = field(default_factory=ScoreUsage)
    span: tuple[float, float] = (0.0, 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def rows(self, begin: int, end: int) -> NDArray[np.float32]:
        if self.error is not None:
            raise self.error
        assert 0 <= begin < end <= len(self.values)
        assert not any(first < end and begin < last for first, last in self.released)
        self.reads.append((begin, end))
        return self.values[begin:end]

    def arrived(self, begin: int, end: int, timeout: float) -> NDArray[np.float32]:
        return self.rows(begin, end)

    def release(self, begin: int, end: int) -> None:
        assert 0 <= begin < end <= len(self.values)
        self.released.append((begin, end))

    def cancel(self) -> None:
        self.cancelled = True


class MemoryScorer:
    """Implements ``ScoringClient``: scores in this process, at once.

    Attributes:
        jobs: Every job so far, in order.
    """

    def __init__(self, score: Score, error: Exception | None = None, scale: RawScale = "logit") -> None:
        self._score = score
        self._scale = scale
        self._error = error
        self.jobs: list[MemoryScores] = []

    def raw_scale(self, timeout: float | None) -> RawScale:
        return self._scale

    def stream_grid(self, queries: Sequence[str], documents: Sequence[str], **options: Any) -> MemoryScores:
        job = MemoryScores(list(queries), list(documents), options, self._score(queries, documents), error=self._error)
        self.jobs.append(job)
        return job

    def stream_pairs(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        query_ids: Sequence[int],
        document_ids: Sequence[int],
        **options: Any,
    ) -> MemoryScores:
        asked = [(queries[query], documents[document]) for query, document in zip(query_ids, document_ids, strict=True)]
        # A grid of one row for each query, so that any ``Score`` function works.
        values = np.empty((len(asked), 1), dtype=np.float32)
        for query in dict.fromkeys(query for query, _ in asked):
            places = [place for place, pair in enumerate(asked) if pair[0] == query]
            values[places, 0] = self._score([query], [asked[place][1] for place in places])[0]
        job = MemoryScores(
            [query for query, _ in asked], [document for _, document in asked], options, values, error=self._error
        )
        self.jobs.append(job)
        return job
