"""Study: evaluates the guides, trains the contenders and evaluates them; saves each result in the ledger at once."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from examples.serving import reranker_server
from examples.student import load_minilm, load_student, retrieval_evaluator
from examples.training import Recipe, train
from loss_client import RerankerClient
from quality import batches, cross_encoder, guides, report, sources
from quality.contenders import SCORE_TYPES, contenders, max_length
from quality.ledger import Ledger
from quality.plan import MARGINS, Guide, Plan, Regime
from quality.sources import KnownRelevance, Parts

# Pairs of a batch in the evaluation of the guides: neighbours in the held-out modules.
_NEIGHBOURS = 24


class Study:
    """Runs the plan: for each seed, all data sets; for each data set, all regimes.

    Args:
        plan: Settings of the study.
        output: Directory for results, models and logs.
        engine: Engine of the servers: ``"torch"``, ``"vllm"`` or ``"auto"``.
        say: Prints one line of progress.
    """

    def __init__(self, plan: Plan, output: Path, engine: str, say: Callable[[str], object]) -> None:
        self._plan = plan
        self._output = output
        self._engine = engine
        self._say = say
        self._work = output / "quality"
        self._work.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(self._work / "ledger.jsonl", plan.digest)
        self._local = guides.RememberingGuide(self._shortened(load_minilm()))
        self._parts: dict[str, Parts] = {}
        self._known: dict[str, KnownRelevance] = {}
        self._pools: dict[tuple[str, str], list[batches.Batch]] = {}
        self._addresses: dict[Guide, str] = {}

    def run(self) -> None:
        """Compute the results that are missing in the ledger, and write the report."""
        for name in self._plan.sources:
            self._read(name)
        model = self._make_cross_encoder()
        with ExitStack() as servers:
            flags: dict[Guide, list[str]] = {
                "bi-encoder": [],
                # The cache is on disk, because many trainings and later studies score the same pairs.
                "cross-encoder": ["--model", str(model), "--cache-dir", str(self._work / "scores")],
            }
            started = {
                guide: servers.enter_context(reranker_server(self._work / f"{guide}.log", self._engine, own))
                for guide, own in flags.items()
            }
            self._addresses = {guide: server.wait_ready() for guide, server in started.items()}
            for name in self._plan.sources:
                self._evaluate_guides(name)
            for seed in self._plan.seeds:
                for name in self._plan.sources:
                    for regime in self._plan.regimes:
                        self._measure_filters(name, regime)
                        self._train_all(name, regime, seed)
        self._write()

    def _read(self, name: str) -> None:
        pairs = sources.read(name, self._plan.pairs, self._plan.packages)
        parts = sources.split(pairs, self._plan.guide_share, self._plan.held_out_share)
        self._parts[name], self._known[name] = parts, KnownRelevance(pairs)
        sizes = {"guide": len(parts.guide), "train": len(parts.train), "held_out": len(parts.held_out)}
        self._say(f"{name}: {len(pairs):,} pairs read; pairs of each part, no two parts with a common text: {sizes}")
        if ("data", name) not in self._ledger:
            self._ledger.add(("data", name), {"pairs": len(pairs), **sizes})

    def _make_cross_encoder(self) -> Path:
        """Return the directory of the cross-encoder; train it unless one with the same data and settings exists."""
        recipe = self._plan.cross_encoder
        pairs = [
            pair
            for parts in self._parts.values()
            for pair in random.Random(0).sample(parts.guide, min(recipe.pairs, len(parts.guide)))
        ]
        made_of = json.dumps([asdict(recipe), self._plan.tokens, [asdict(pair) for pair in pairs]])
        model = self._work / f"cross-encoder-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
        if model.exists():
            self._say(f"Using the cross-encoder that was trained before: {model}")
            return model
        self._say(f"Training the cross-encoder on {len(pairs):,} pairs")
        began = time.monotonic()
        unfinished = model.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        losses = cross_encoder.make(pairs, recipe, self._local, unfinished)
        unfinished.rename(model)
        self._say(
            f"  {time.monotonic() - began:.0f} s; mean loss of every 25 steps: "
            f"{', '.join(f'{loss:.2f}' for loss in losses)}"
        )
        return model

    def _score_grid(self, guide: Guide) -> guides.ScoreGrid:
        client = RerankerClient(self._addresses[guide])

        def score(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
            return client.score_grid(
                queries, documents, max_length=max_length(self._plan, guide), score_type=SCORE_TYPES[guide], timeout=600
            )

        return score

    def _evaluate_guides(self, name: str) -> None:
        held_out = self._parts[name].held_out
        evaluator = self._evaluator(name)
        for model, load in (("untrained student", self._load_student), ("bi-encoder", lambda: self._local)):
            if ("reference", name, model) not in self._ledger:
                self._ledger.add(("reference", name, model), self._ndcg(evaluator, load()))
        for guide in MARGINS:
            if ("guide", name, guide) in self._ledger:
                continue
            laid = batches.pool(
                held_out, "related", _NEIGHBOURS, max(1, self._plan.guide_queries // _NEIGHBOURS), self._local
            )
            score = self._score_grid(guide)
            found = guides.evaluate([guides.score(batch, score, self._known[name]) for batch in laid])
            self._ledger.add(("guide", name, guide), found)
            self._say(f"{name}, {guide} evaluated on held-out pairs: {found}")

    def _pool(self, name: str, regime: Regime) -> list[batches.Batch]:
        if (name, regime.name) not in self._pools:
            self._pools[name, regime.name] = batches.pool(
                self._parts[name].train, regime.batching, regime.batch_size, regime.pool, self._local
            )
        return self._pools[name, regime.name]

    def _measure_filters(self, name: str, regime: Regime) -> None:
        """Score all pairs of the pool; afterwards the trainings find their scores in the servers' caches."""
        for guide in regime.measured:
            wanted = {margin: ("filter", name, regime.name, guide, str(margin)) for margin in MARGINS[guide]}
            if all(key in self._ledger for key in wanted.values()):
                continue
            began, score = time.monotonic(), self._score_grid(guide)
            scored = [guides.score(batch, score, self._known[name]) for batch in self._pool(name, regime)]
            for margin, key in wanted.items():
                self._ledger.add(key, dict(guides.count_masked(scored, margin)))
            pairs = sum(batch.scores.size for batch in scored)
            self._say(f"{name}, {regime.name}: {guide} scored {pairs:,} pairs in {time.monotonic() - began:.0f} s")

    def _train_all(self, name: str, regime: Regime, seed: int) -> None:
        evaluator = self._evaluator(name)
        for contender in contenders(self._plan, regime, self._local, self._addresses):
            key = ("run", name, regime.name, contender.name, str(seed))
            if key in self._ledger:
                continue
            began = time.monotonic()
            done = train(
                contender,
                self._load_student,
                batches.for_seed(self._pool(name, regime), regime.steps, seed),
                Recipe(
                    regime.steps,
                    regime.batch_size,
                    self._plan.learning_rate,
                    seed,
                    {"batch_sampler": batches.in_order},
                ),
                self._work / "trainer",
                lambda text: None,
            )
            record = {
                **self._ndcg(evaluator, done.model),
                "loss": contender.loss,
                "anchors": regime.steps * regime.batch_size,
                "step_seconds": done.step_seconds,
                **asdict(done.counts),
                "last_loss": done.losses[-1][1],
            }
            seconds = time.monotonic() - began
            self._ledger.add(key, {**record, "seconds": seconds})
            report.write_figures(self._output / "quality.json", self._ledger)
            self._say(
                f"{name}, {regime.name}, seed {seed}, {contender.name}: nDCG@10 {record['ndcg']:.4f}, {seconds:.0f} s"
            )

    def _write(self) -> None:
        report.write_figures(self._output / "quality.json", self._ledger)
        (self._output / "quality.md").write_text(report.tables(self._ledger), encoding="utf-8")
        report.draw_gains(self._output / "quality.png", self._ledger)
        report.draw_margins(self._output / "quality-margins.png", self._ledger)
        self._say(report.tables(self._ledger))
        self._say(f"Results are in {self._output}/: quality.json, quality.md, quality.png, quality-margins.png")

    def _evaluator(self, name: str) -> InformationRetrievalEvaluator:
        return retrieval_evaluator(self._parts[name].held_out, self._plan.queries, seed=0)

    def _ndcg(self, evaluator: InformationRetrievalEvaluator, model: SentenceTransformer) -> dict[str, float]:
        found = evaluator(model)
        return {measure: found[f"{evaluator.name}_cosine_{measure}@10"] for measure in ("ndcg", "mrr")}

    def _load_student(self) -> SentenceTransformer:
        return self._shortened(load_student(self._plan.layers))

    def _shortened(self, model: SentenceTransformer) -> SentenceTransformer:
        model.max_seq_length = self._plan.tokens
        return model
