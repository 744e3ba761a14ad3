"""Check of a model: says what it is and how it is read, scores three pairs, and compares engines with the library.

reranker-service check MODEL [--engine torch vllm] [--dtype FORMAT] [--family NAME] [--adapter DIR] [...]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import ValidationError

from .engines import Engine
from .loading import choose_model, make_engine, refused_by_vllm
from .models import ModelSpec, PairLayout, TextLayout, UnsupportedModelError, make_layout
from .scheduling import Scheduler, Ticket
from .scoring import Pairs, Scorer, TextTable, known_answer
from .settings import Settings

# Scores of one model in float32 differ by rounding; in 16 bits, by a few hundredths of a logit or of a cosine's range.
_TOLERANCE = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}
_LONG = " ".join([known_answer.RELEVANT, known_answer.IRRELEVANT] * 8)
_TEXTS = (known_answer.QUERY, known_answer.RELEVANT, known_answer.IRRELEVANT, _LONG)
_PAIRS = ("relevant", "irrelevant", "long")
_SPEED_QUERIES, _SPEED_DOCUMENTS = 4, 16

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Reference:
    """Raw scores of the three pairs that those of an engine are compared with.

    Attributes:
        name: The library, or the engine that was tried first.
        dtype: Number format of their computation.
        scores: The scores, float32, shape ``(3,)``.
    """

    name: str
    dtype: str
    scores: NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a model.

    Args:
        arguments: Arguments of the command line; ``None`` for those of this process, without the word "check".

    Returns:
        0 if everything is right; 1 if the model is refused, ranks the known answer wrong, or if scores differ.
    """
    parser = argparse.ArgumentParser(prog="reranker-service check", description=__doc__)
    parser.add_argument("model", nargs="?", help="directory, or name on the hub; default: the embedded model")
    parser.add_argument(
        "--engine", nargs="+", choices=("torch", "vllm"), help="engines; default: all that are installed and serve it"
    )
    parser.add_argument("--dtype", choices=("auto", *_TOLERANCE), default="auto", help="number format of the engines")
    fields = Settings.model_fields
    parser.add_argument("--family", help=fields["family"].description)
    parser.add_argument("--revision", help=fields["revision"].description)
    parser.add_argument("--adapter", type=Path, help=fields["adapter"].description)
    parser.add_argument("--prompts", type=json.loads, default={}, help=fields["prompts"].description)
    parser.add_argument("--trust-remote-code", action="store_true", help=fields["trust_remote_code"].description)
    options = parser.parse_args(arguments)
    engines = options.engine
    given = {name: value for name, value in vars(options).items() if name != "engine"}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        parser.error(str(error))
    _be_quiet()
    try:
        return asyncio.run(_check(settings, engines, print))
    except UnsupportedModelError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1


def _be_quiet() -> None:
    """Keep progress bars and events of the libraries out of the report."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    from transformers.utils import logging as of_transformers

    quiet: Any = of_transformers
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


async def _check(settings: Settings, engines: Sequence[str] | None, say: Say) -> int:
    spec = await asyncio.to_thread(choose_model, settings)
    layout = make_layout(spec)
    _describe(spec, layout, say)
    scores = _library_scores(spec, say)
    reference = None if scores is None else Reference("sentence-transformers in float32", "float32", scores)
    faults = []
    for name in engines or _installed(spec, say):
        engine = make_engine(settings.model_copy(update={"engine": name}), spec)
        try:
            began = time.monotonic()
            await engine.start()
            seconds = time.monotonic() - began
            found, scores = await _try(spec, layout, engine, seconds, reference, say)
            faults += found
            # Where the library gives no scores, the engines are compared with each other.
            reference = reference or Reference(f"{engine.name} {engine.dtype}", engine.dtype, scores)
        finally:
            await engine.close()
    for fault in faults:
        say(f"FAULT: {fault}")
    say("not right" if faults else "all right")
    return int(bool(faults))


def _describe(spec: ModelSpec, layout: PairLayout | TextLayout, say: Say) -> None:
    say(f"model       {spec.name}: {spec.kind}, {spec.architecture} ({spec.model_type})")
    if spec.family is not None:
        say(f"family      {spec.family}: template and answers come from the registry, not from the model's files")
    if spec.adapter is not None:
        say(f"adapter     {spec.adapter}, merged into the weights")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code
    )
    if spec.answers is not None:
        answers = [repr(tokenizer.decode([one])) for one in spec.answers if one is not None]
        say(f"score from  the logit of {' minus that of '.join(answers)}")
    elif spec.library_model:
        modules = ", ".join(["Transformer", *(name for name, _ in spec.chain)])
        say(f"score from  {modules}: the whole model is run by sentence-transformers")
    elif spec.chain:
        say(f"score from  {', '.join(name for name, _ in spec.chain)}, run by sentence-transformers")
    elif spec.pooling is not None:
        width = spec.dimensions or spec.hidden_size
        function = "cosine" if spec.normalized else "dot product"
        say(f"score from  the {function} of two embeddings of {width} numbers, {spec.pooling} pooling")
    else:
        say("score from  a head of one label")
    say(f"lengths     {spec.default_length} tokens by default, {spec.max_length} at most")
    say(f"template    {layout.template or 'none'}")
    if spec.query_prompt or spec.document_prompt:
        say(f"prompts     query {spec.query_prompt!r}, document {spec.document_prompt!r}")
    query = layout.encode_queries([known_answer.QUERY], None if layout.template is None else layout.default_instruction)
    document = layout.encode_documents([known_answer.RELEVANT])
    if isinstance(layout, TextLayout):
        inputs = [layout.single(text, spec.default_length)[0] for text in (*query, *document)]
    else:
        inputs = layout.join(query, document, spec.default_length)
    if spec.library_input:
        from .models.one_by_one import PairByPairLayout, TextByTextLayout

        slow = isinstance(layout, (PairByPairLayout, TextByTextLayout))
        how = "by sentence-transformers, one by one" if slow else "joined from tokens; proved equal to the library's"
        say(f"inputs      {how}")
    for one in inputs:
        say(f"input       {len(one.ids)} tokens: {tokenizer.decode(one.ids.tolist())!r}")


def _installed(spec: ModelSpec, say: Say) -> list[str]:
    names = ["torch"]
    if importlib.util.find_spec("vllm") is None:
        say("vllm        not installed")
    elif reason := refused_by_vllm(spec):
        say(f"vllm        {reason}")
    else:
        names.append("vllm")
    return names


def _library_scores(spec: ModelSpec, say: Say) -> NDArray[np.float32] | None:
    """Raw scores of sentence-transformers for the three pairs, in float32 on the CPU; ``None`` where it gives none."""
    if spec.family is not None:
        say(f"library     sentence-transformers does not know the template of {spec.family}: not compared")
        return None
    from sentence_transformers import CrossEncoder, SentenceTransformer

    options: dict[str, Any] = {
        "device": "cpu",
        "local_files_only": True,
        "trust_remote_code": spec.trust_remote_code,
        "model_kwargs": {"dtype": "float32"},
    }
    query, *documents = _TEXTS
    if spec.kind == "bi-encoder":
        embedder: Any = SentenceTransformer(str(spec.root), **options)
        _merge(spec, embedder)
        normal = {"normalize_embeddings": spec.normalized}
        left = embedder.encode_query([query], prompt=spec.query_prompt, **normal)
        scores = left @ embedder.encode_document(documents, prompt=spec.document_prompt, **normal).T
        return np.asarray(scores[0], dtype=np.float32)
    import torch

    encoder: Any = CrossEncoder(str(spec.root), **options)
    _merge(spec, encoder)
    encoder.max_seq_length = spec.default_length
    pairs = [(query, one) for one in documents]
    raw = encoder.predict(pairs, prompt=spec.query_prompt, activation_fn=torch.nn.Identity(), batch_size=1)
    # A model with modules of its own may give a column.
    return np.asarray(raw, dtype=np.float32).reshape(len(pairs))


def _merge(spec: ModelSpec, model: Any) -> None:
    """Merge the adapter of ``spec`` into a model of the library, if there is one."""
    if spec.adapter is not None:
        from .engines.library import merge_adapter

        model[0].model = merge_adapter(spec, model[0].model)


async def _try(
    spec: ModelSpec,
    layout: PairLayout | TextLayout,
    engine: Engine,
    start_seconds: float,
    reference: Reference | None,
    say: Say,
) -> tuple[list[str], NDArray[np.float32]]:
    """Score the pairs with a started engine; return the faults and the scores."""
    name = f"{engine.name} {engine.dtype}"
    scorer = Scorer(spec, layout, Scheduler(engine))
    try:
        scores = await _score(scorer, _TEXTS, np.array([0]), np.array([1, 2, 3]))
        words = [f"query {number} of {spec.name}: {known_answer.QUERY}" for number in range(_SPEED_QUERIES)]
        words += [f"document {number}: {known_answer.RELEVANT}" for number in range(_SPEED_DOCUMENTS)]
        queries, documents = np.arange(_SPEED_QUERIES), np.arange(_SPEED_DOCUMENTS) + _SPEED_QUERIES
        await _score(scorer, words, queries, documents)
        began = time.perf_counter()
        await _score(scorer, words, queries, documents)
        rate = len(queries) * len(documents) / (time.perf_counter() - began)
    finally:
        scorer.close()
    say(f"{name}: " + ", ".join(f"{pair} {score:.6g}" for pair, score in zip(_PAIRS, scores, strict=True)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(
        f"{name}: started in {start_seconds:.1f} s, {rate:,.0f} short pairs/s, {memory:.1f} GiB of this process at most"
    )
    faults = []
    answer = known_answer.KnownAnswer(*scores[:2].tolist())
    if answer.equal:
        faults.append(f"{name} gives a relevant and an irrelevant document the same score: the model's head is lost")
    elif answer.wrong:
        faults.append(f"{name} gives an irrelevant document a higher score than a relevant one")
    if reference is not None:
        apart = float(np.abs(scores - reference.scores).max())
        allowed = max(_TOLERANCE.get(one, _TOLERANCE["bfloat16"]) for one in (engine.dtype, reference.dtype))
        say(f"{name}: differs from {reference.name} by {apart:.2g} at most; allowed are {allowed:g}")
        if not apart <= allowed:
            faults.append(f"{name} differs from {reference.name} by {apart:.2g}: {reference.scores.tolist()}")
    return faults, scores


async def _score(
    scorer: Scorer, texts: Sequence[str], queries: NDArray[np.int64], documents: NDArray[np.int64]
) -> NDArray[np.float32]:
    options = replace(scorer.ranges.defaults, raw=True)
    table = TextTable(options, Ticket("check", interactive=True), texts)
    try:
        return (await scorer.score(table, Pairs(queries, documents, grid=True))).scores
    finally:
        table.close()
