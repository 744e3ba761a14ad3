"""Study: evaluates the guides, trains the contenders and evaluates them; saves each result in the ledger at once."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from examples.docstrings import Pair
from examples.serving import reranker_server
from examples.student import load_minilm, load_student, retrieval_evaluator
from examples.training import Recipe, train
from loss_client import RerankerClient
from loss_client.client.scores import ScoreType
from loss_client.compare.evaluation import RetrievalEvaluator
from loss_client.filter.jobs import ScoringClient
from quality import batches, contenders, cross_encoder, evaluation, guides, report, sources, tuned
from quality.contenders import SCORE_TYPES, max_length
from quality.ledger import Ledger
from quality.mean_guide import MeanScorer, Member, onto
from quality.plan import AVERAGED, MARGINS, SERVED, Entrant, Guide, OwnDocuments, Plan, Regime, Stage
from quality.sources import KnownRelevance, Parts

# Pairs of a batch in the evaluation of the guides: neighbours in the held-out modules.
_NEIGHBOURS = 24

#: Least nDCG@10 by which a guide has to be above the bi-encoder to count as clearly better.
FLOOR = 0.03


class Study:
    """Runs the plan: evaluates the guides, then trains stage by stage; in a stage for each seed, all data sets.

    Args:
        plan: Settings of the study.
        output: Directory for results, models and logs.
        engine: Engine of the servers: ``"torch"``, ``"vllm"`` or ``"auto"``.
        say: Prints one line of progress.
        stages: Names of the stages to run; ``None`` for all.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        engine: str,
        say: Callable[[str], object],
        stages: Collection[str] | None = None,
    ) -> None:
        self._plan = plan
        self._output = output
        self._engine = engine
        self._say = say
        self._stages = [stage for stage in plan.stages if stages is None or stage.name in stages]
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
        for stage in self._stages:
            for name in stage.sources:
                # Now, so that too few pairs end the study before anything is trained.
                self._pool(name, self._plan.regime(stage.regime))
        tuned_model, cross_encoder_model = self._make_tuned(), self._make_cross_encoder()
        with ExitStack() as servers:
            flags: dict[Guide, list[str]] = {
                "bi-encoder": [],
                "tuned bi-encoder": ["--model", str(tuned_model)],
                # The cache is on disk, because many trainings and later studies score the same pairs.
                "cross-encoder": ["--model", str(cross_encoder_model), "--cache-dir", str(self._work / "scores")],
            }
            started = {
                guide: servers.enter_context(reranker_server(self._work / f"{guide}.log", self._engine, own))
                for guide, own in flags.items()
            }
            self._addresses = {guide: server.wait_ready() for guide, server in started.items()}
            for name in dict.fromkeys(name for stage in self._stages for name in stage.sources):
                self._evaluate_guides(name)
            for stage in self._stages:
                regime = self._plan.regime(stage.regime)
                for name in stage.sources:
                    self._measure_filters(name, regime, stage.measured)
                for seed in stage.seeds:
                    for name in stage.sources:
                        for entrant in stage.entrants:
                            self._train(stage, regime, name, entrant, seed)
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
        """Return the directory of the trained cross-encoder."""
        recipe = self._plan.cross_encoder
        return self._made(
            "cross-encoder", recipe, lambda pairs, output: cross_encoder.make(pairs, recipe, self._local, output)
        )

    def _make_tuned(self) -> Path:
        """Return the directory of the tuned bi-encoder."""
        recipe = self._plan.tuned
        return self._made(
            "tuned bi-encoder",
            recipe,
            lambda pairs, output: tuned.make(pairs, recipe, self._shortened(load_minilm()), output),
        )

    def _made(
        self,
        guide: Guide,
        recipe: cross_encoder.Recipe | tuned.Recipe,
        make: Callable[[list[Pair], Path], list[float]],
    ) -> Path:
        """Return the directory of a trained guide; train it unless one with the same data and settings exists."""
        pairs = [
            pair
            for parts in self._parts.values()
            for pair in random.Random(0).sample(parts.guide, min(recipe.pairs, len(parts.guide)))
        ]
        made_of = json.dumps([asdict(recipe), self._plan.tokens, [asdict(pair) for pair in pairs]])
        model = self._work / f"{guide.replace(' ', '-')}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
        if model.exists():
            self._say(f"Using the {guide} that was trained before: {model}")
            return model
        self._say(f"Training the {guide} on {len(pairs):,} pairs")
        began = time.monotonic()
        unfinished = model.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        losses = make(pairs, unfinished)
        unfinished.rename(model)
        self._say(
            f"  {time.monotonic() - began:.0f} s; mean loss of every 25 steps: "
            f"{', '.join(f'{loss:.2f}' for loss in losses)}"
        )
        return model

    def _score_grid(self, guide: Guide, score_type: ScoreType | None = None) -> guides.ScoreGrid:
        client = RerankerClient(self._addresses[guide])

        def score(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
            return client.score_grid(
                queries,
                documents,
                max_length=max_length(self._plan, guide),
                score_type=score_type or SCORE_TYPES[guide],
                timeout=600,
            )

        return score

    def _evaluate_guides(self, name: str) -> None:
        """Evaluate each guide by itself, and the mean of two, before any student is trained."""
        held_out = self._parts[name].held_out
        evaluator = self._evaluator(name)
        for model, load in (("untrained student", self._load_student), ("bi-encoder", lambda: self._local)):
            if ("reference", name, model) not in self._ledger:
                self._ledger.add(("reference", name, model), evaluation.evaluate(evaluator, load()))
        if ("guide", name, "mean") not in self._ledger:
            laid = batches.pool(
                held_out, "related", _NEIGHBOURS, max(1, self._plan.guide_queries // _NEIGHBOURS), self._local
            )
            scored: dict[Guide, list[guides.ScoredBatch]] = {
                guide: [guides.score(batch, self._score_grid(guide), self._known[name]) for batch in laid]
                for guide in SERVED
            }
            cosines = scored["tuned bi-encoder"]
            logits = [
                guides.score(batch, self._score_grid("cross-encoder", "raw"), self._known[name]) for batch in laid
            ]
            factor, shift = onto([batch.scores for batch in cosines], [batch.scores for batch in logits])
            scored["mean"] = [
                replace(one, scores=((one.scores + factor * other.scores + shift) / 2).astype(np.float32))
                for one, other in zip(cosines, logits, strict=True)
            ]
            self._ledger.add(("mean", name), {"factor": factor, "shift": shift})
            for guide, evaluated in scored.items():
                self._ledger.add(("guide", name, guide), guides.evaluate(evaluated))
        found = {guide: record["ndcg"] for (guide,), record in self._ledger.under("guide", name).items()}
        for model, ndcg in found.items():
            above = ndcg - found["bi-encoder"]
            verdict = "" if model == "bi-encoder" else f", {above:+.3f} to the bi-encoder (floor: {FLOOR:+.3f})"
            self._say(f"{name}: {model} by itself, nDCG@10 on held-out neighbours {ndcg:.3f}{verdict}")

    def _guides(self, name: str) -> dict[Guide, str | ScoringClient]:
        """Return the address or the client of each guide for a data set."""
        maps = {"tuned bi-encoder": {}, "cross-encoder": self._ledger.under("mean", name)[()]}
        members = [
            Member(RerankerClient(self._addresses[guide]), max_length(self._plan, guide), **maps[guide])
            for guide in AVERAGED
        ]
        return {**self._addresses, "mean": MeanScorer(members)}

    def _pool(self, name: str, regime: Regime) -> list[batches.Batch]:
        if (name, regime.name) not in self._pools:
            self._pools[name, regime.name] = batches.pool(
                self._parts[name].train, regime.batching, regime.batch_size, regime.pool, self._local
            )
        return self._pools[name, regime.name]

    def _measure_filters(self, name: str, regime: Regime, measured: Sequence[Guide]) -> None:
        """Score the first batches; afterwards the trainings find these scores in the servers' caches."""
        for guide in measured:
            wanted = {margin: ("filter", name, regime.name, guide, str(margin)) for margin in MARGINS[guide]}
            if all(key in self._ledger for key in wanted.values()):
                continue
            began, score = time.monotonic(), self._score_grid(guide)
            laid = self._pool(name, regime)[: self._plan.measured_batches]
            scored = [guides.score(batch, score, self._known[name]) for batch in laid]
            for margin, key in wanted.items():
                self._ledger.add(key, dict(guides.count_masked(scored, margin)))
            pairs = sum(batch.scores.size for batch in scored)
            self._say(f"{name}, {regime.name}: {guide} scored {pairs:,} pairs in {time.monotonic() - began:.0f} s")

    def _train(self, stage: Stage, regime: Regime, name: str, entrant: Entrant, seed: int) -> None:
        key = ("run", stage.table, name, entrant.name, str(seed))
        if key in self._ledger:
            return
        began = time.monotonic()
        dataset = batches.for_seed(self._pool(name, regime), regime.steps, seed)
        if isinstance(entrant, OwnDocuments):
            dataset = contenders.labelled(dataset, self._score_pairs(entrant.guide))
        contender = contenders.make(self._plan, entrant, self._local, self._guides(name), dataset)
        done = train(
            contender,
            self._load_student,
            dataset,
            Recipe(
                regime.steps,
                regime.batch_size,
                self._plan.learning_rate,
                seed,
                {"batch_sampler": batches.in_order},
            ),
            self._work / "trainer",
            lambda report: None,
        )
        record = {
            **evaluation.evaluate(self._evaluator(name), done.model),
            "loss": contender.loss,
            "anchors": regime.steps * regime.batch_size,
            "step_seconds": done.step_seconds,
            **asdict(done.counts),
            "last_loss": done.losses[-1][1],
        }
        seconds = time.monotonic() - began
        self._ledger.add(key, {**record, "seconds": seconds})
        self._say(
            f"{stage.table}, {name}, seed {seed}, {contender.name}: nDCG@10 {record['ndcg']:.4f}, {seconds:.0f} s"
        )

    def _score_pairs(self, guide: Guide) -> contenders.ScorePairs:
        client = RerankerClient(self._addresses[guide])
        return partial(client.score_pairs, max_length=max_length(self._plan, guide), score_type="raw", timeout=600)

    def _write(self) -> None:
        report.write_figures(self._output / "quality.json", self._ledger)
        (self._output / "quality.md").write_text(report.tables(self._ledger), encoding="utf-8")
        report.draw_gains(self._output / "quality.png", self._ledger)
        report.draw_margins(self._output / "quality-margins.png", self._ledger)
        self._say(report.tables(self._ledger))
        self._say(f"Results are in {self._output}/: quality.json, quality.md, quality.png, quality-margins.png")

    def _evaluator(self, name: str) -> RetrievalEvaluator:
        return retrieval_evaluator(self._parts[name].held_out, self._plan.queries, seed=0)

    def _load_student(self) -> SentenceTransformer:
        return self._shortened(load_student(self._plan.layers))

    def _shortened(self, model: SentenceTransformer) -> SentenceTransformer:
        model.max_seq_length = self._plan.tokens
        return model
