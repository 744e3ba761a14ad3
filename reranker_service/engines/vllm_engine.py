"""vLLM engine, for production: gives token ids to vLLM's AsyncLLM, which batches them and caches prefixes.

vLLM runs the model in processes of its own. ``close`` ends them, even if they are still loading.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import count
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..models import ModelSpec, TokenSequence
from .base import EngineDeadError
from .checks import finite
from .vllm_arguments import (
    NEUTRAL_ARGUMENTS,
    PRIORITY_POLICY,
    bind_cores,
    check_arguments,
    check_supported,
    engine_arguments,
    library_versions,
    with_given,
)
from .vllm_processes import fork_engine_core, kill_loading, start_importing

if TYPE_CHECKING:
    from vllm.outputs import PoolingRequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

_CACHED_PROMPTS = 4
_SHUTDOWN_SECONDS = 20.0
# Seconds in which later urgent requests overtake another one. Without a limit, bulk work inside vLLM would
# wait as long as urgent requests keep coming.
_OVERTAKEN_SECONDS = 5


class NoResultError(RuntimeError):
    """vLLM ended a request without a result."""


class VllmEngine:
    """Implements ``Engine`` with vLLM."""

    name = "vllm"
    batch_tokens = None

    def __init__(
        self, spec: ModelSpec, *, dtype: str = "auto", engine_args: Mapping[str, object] | None = None
    ) -> None:
        """Check that vLLM can run the model. ``start`` imports vLLM and starts its processes.

        Args:
            spec: The model.
            dtype: A number format as vLLM names it, or "auto": float32 on a CPU; elsewhere vLLM's choice, which is the
                checkpoint's own, and float16 for float32 ones.
            engine_args: More arguments for ``AsyncEngineArgs``; they override those chosen here.

        Raises:
            UnsupportedModelError: vLLM can't run this model.
        """
        check_supported(spec)
        self.dtype = dtype
        self.max_batch = 64
        self.max_in_flight = 512
        self.step_tokens: int | None = None
        self.versions: dict[str, str] = {}
        self._spec = spec
        self._engine_args = dict(engine_args or {})
        self.scoring_args = {name: value for name, value in self._engine_args.items() if name not in NEUTRAL_ARGUMENTS}
        self.overtakes = self._engine_args.get("scheduling_policy", PRIORITY_POLICY) == PRIORITY_POLICY
        self._engine: AsyncLLM | None = None
        self._request_ids = count()
        self._loading: asyncio.Future[None] | None = None
        self._closed = asyncio.Event()

    async def start(self) -> None:
        """Start vLLM's processes and load the model; the event loop stays free meanwhile."""
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        # A thread can't be cancelled: close() ends the processes that it has started.
        await asyncio.shield(self._loading)
        assert self._engine is not None
        config = self._engine.vllm_config
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        # Twice as many as vLLM runs at a time, so that it never runs out of work.
        self.max_in_flight = 2 * config.scheduler_config.max_num_seqs
        self.max_batch = min(self.max_batch, config.scheduler_config.max_num_seqs)
        self.step_tokens = config.scheduler_config.max_num_batched_tokens
        if config.cache_config.enable_prefix_caching:
            # Tokens of a prompt that are in the prefix cache are not computed.
            self.step_tokens *= _CACHED_PROMPTS

    def choices(self) -> dict[str, object]:
        """Settings that the engine chose; see ``Engine.choices``."""
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
        try:
            values = np.stack(await self._encode(self._engine, sequences, urgent))
        except VllmDeadError as error:
            raise EngineDeadError(f"vLLM's engine has died: {error}") from error
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
        """End vLLM's processes, even if ``start`` is still running."""
        self._closed.set()
        loading, self._loading = self._loading, None
        if loading is None:
            return
        while not loading.done():
            # A process that is still loading ignores SIGTERM; once it is killed, the loading thread gives up.
            await asyncio.to_thread(kill_loading)
            await asyncio.wait({loading}, timeout=0.2)
        # start() has raised the error already, if there was one.
        loading.exception()
        engine, self._engine = self._engine, None
        if engine is not None:
            if engine.output_handler is not None:
                # Otherwise vLLM's output handler reports this shutdown as a failure.
                engine.output_handler.cancel()
            await asyncio.to_thread(engine.shutdown, _SHUTDOWN_SECONDS)
        # The engine is part of reference cycles. Its destructor fails noisily at the interpreter's exit.
        del engine
        gc.unfreeze()
        gc.collect()

    async def _encode(
        self, engine: AsyncLLM, sequences: Sequence[TokenSequence], urgent: bool
    ) -> list[NDArray[np.float32]]:
        """Compute one result a sequence. If one fails, or the call is cancelled, the others are aborted inside vLLM."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        # vLLM runs the request of the smallest number first, and requests of one number in order of arrival.
        priority = int(time.monotonic()) + (0 if urgent else _OVERTAKEN_SECONDS)
        requests = [(str(next(self._request_ids)), sequence) for sequence in sequences]
        pending: list[RequestOutputCollector] = []
        values: list[NDArray[np.float32]] = []
        try:
            # encode would need a task for each request: add_request takes about 0.8 of its processor time.
            for request_id, sequence in requests:
                if self._spec.kind == "bi-encoder":
                    params = PoolingParams(task="embed")
                else:
                    params = PoolingParams(task="classify", use_activation=False)
                    if sequence.first_segment < len(sequence.ids):
                        # vLLM takes token types only in this form: the index of the first 1.
                        params.extra_kwargs = {"compressed_token_type_ids": sequence.first_segment}
                prompt = tokens_input(sequence.ids.tolist())
                pending.append(await engine.add_request(request_id, prompt, params, priority=priority))
            for sequence, request in zip(sequences, pending, strict=True):
                data = cast("PoolingRequestOutput", await request.get()).outputs.data
                # An aborted request ends with an empty tensor, not with an error.
                if not data.numel():
                    raise NoResultError(f"vLLM gave no result for an input of {len(sequence.ids)} tokens")
                values.append(data.float().reshape(-1).numpy())
        except BaseException:
            # Requests that have ended are unknown to vLLM, which ignores them.
            await engine.abort([request_id for request_id, _ in requests])
            raise
        return values

    def _load(self) -> None:
        start_importing()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = bool(current_platform.is_cpu())
        devices = torch.cuda.device_count() if current_platform.is_cuda() else None
        check_arguments(self._engine_args, {field.name for field in fields(AsyncEngineArgs)}, devices)
        if on_cpu:
            bind_cores()
        self.versions = library_versions()
        arguments = AsyncEngineArgs(**with_given(engine_arguments(self._spec, self.dtype, on_cpu), self._engine_args))
        # numactl can only wrap a new interpreter.
        if not arguments.numa_bind:
            fork_engine_core()
        # The only reference to the engine: if this function returned it as well, its future would keep close() from
        # collecting it.
        self._engine = AsyncLLM.from_engine_args(arguments)
