"""Torch engine, for laptops, tests and small servers: transformers in this process, on one worker thread.

One call of ``run`` is one batch: packed without padding on a GPU in 16 bits, if the model's numbers stay the same, and
padded elsewhere. The scheduler composes batches of sequences of similar length. Batches wait in the worker thread's
queue. Cancelling a call before its batch begins removes the batch from the queue. On a GPU the worker thread only
queues a batch's kernels; a second thread waits for the result, so that the next batch is prepared meanwhile.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ..models import ModelSpec, Pooling, TokenSequence, UnsupportedModelError
from .answers import answer_head, answer_scores, narrow_to_answers
from .base import EngineDeadError
from .chain import ModuleChain
from .checks import EngineMemoryError, finite
from .formats import auto_format, has_bfloat16, in_one_format
from .head import head_in_float32
from .library import LibraryModel, check_weights, merge_adapter
from .packed import (
    Packed,
    PackedBackbone,
    PackedClassifier,
    kernel_available,
    pack_backbone,
    pack_classifier,
    to_device,
)

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
# Operations of a batch on a GPU, and the bounds of its tokens. A current GPU does about 4e14 operations a second.
_BATCH_OPERATIONS = 2e13
_LEAST_BATCH_TOKENS = 8_192
_MOST_BATCH_TOKENS = 131_072
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = structlog.get_logger()


class TorchEngine:
    """Implements ``Engine`` with transformers."""

    name = "torch"
    overtakes = False  # at most one batch waits inside it
    step_tokens: int | None = None

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        batch_tokens: int | None = None,
        packed: bool | None = None,
        compiled: bool | None = None,
    ) -> None:
        """Choose device and number format. ``start`` loads the model.

        Args:
            spec: The model.
            dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU; elsewhere vLLM's choice, which
                is the checkpoint's own, and float16 for float32 ones.
            device: A device as torch names it, or "auto": the GPU if there is one.
            threads: Threads of one operation on a CPU; ``None`` leaves it to torch.
            batch_tokens: Most tokens of a batch, padding included; ``None`` means 4,096 on a CPU, and elsewhere a
                number that depends on the model's size. A longer sequence is a batch of its own.
            packed: Whether batches are packed without padding where the model's numbers stay the same; ``None`` means
                on a GPU that has the kernel for it.
            compiled: Whether the layers of a model with packed batches are compiled, which takes ``start`` up to half
                a minute; ``None`` means on a GPU.

        Raises:
            ValueError: ``dtype`` or ``device`` is unknown.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device {device!r} is unknown to torch: {error}") from error
        on_cpu = self._device.type == "cpu"
        if dtype == "auto":
            dtype = "float32" if on_cpu else auto_format(spec, has_bfloat16(self._device))
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; known are auto, {', '.join(_DTYPES)}")
        self.dtype = dtype
        self.max_batch = 256 if on_cpu else 2048
        self.max_in_flight = 2 * self.max_batch
        self.versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
        self.scoring_args: dict[str, object] = {}
        self._spec = spec
        self._sized = batch_tokens is None and not on_cpu
        self.batch_tokens = batch_tokens or 4096
        self._compile = not on_cpu if compiled is None else compiled
        self._compiled = False
        self._threads = threads
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch-engine")
        self._waiter = ThreadPoolExecutor(max_workers=2, thread_name_prefix="torch-engine-results")
        self._packed = kernel_available(self._device, _DTYPES[dtype]) if packed is None else packed
        self._model: torch.nn.Module | None = None
        self._backbone: PackedBackbone | None = None
        self._classifier: PackedClassifier | None = None
        self._chain: ModuleChain | None = None
        self._library: LibraryModel | None = None
        self._head: torch.Tensor | None = None
        self._answers = spec.answers
        self._padding = 0
        self._death: EngineDeadError | None = None
        self._died = asyncio.Event()

    async def start(self) -> None:
        """Load the model.

        Raises:
            UnsupportedModelError: Its weights do not fit its configuration.
        """
        await asyncio.get_running_loop().run_in_executor(self._worker, self._load)

    def choices(self) -> dict[str, object]:
        """Settings that the engine chose; see ``Engine.choices``."""
        return {
            "device": str(self._device),
            "threads": self._threads or torch.get_num_threads(),
            "batch_tokens": self.batch_tokens,
            "packed": self._backbone is not None or self._classifier is not None,
            "compiled": self._compiled,
        }

    async def run(self, sequences: Sequence[TokenSequence], urgent: bool = False) -> NDArray[np.float32]:
        """Compute raw scores, shape ``(n,)``, or embeddings, shape ``(n, dim)``; see ``Engine.run``.

        Raises:
            EngineDeadError: The device has failed for good.
            NonFiniteScoreError: A result is not a finite number.
            EngineMemoryError: The device's memory does not suffice for a sequence of its own.
        """
        if self._death is not None:
            # The call that saw the device fail may have been cancelled before it could set the event.
            self._died.set()
            raise self._death
        if not sequences:
            return np.empty(0, dtype=np.float32)
        try:
            # Cancelling this future removes a batch that has not begun from the worker's queue.
            loop = asyncio.get_running_loop()
            pending = await loop.run_in_executor(self._worker, self._forward, list(sequences))
            if pending.ready is None:
                values = self._wait(pending)
            else:
                values = await loop.run_in_executor(self._waiter, self._wait, pending)
        except EngineDeadError:
            self._died.set()
            raise
        return finite(self._spec.name, self.dtype, values)

    async def wait_dead(self) -> EngineDeadError:
        """Return once the device has failed for good."""
        await self._died.wait()
        assert self._death is not None
        return self._death

    async def close(self) -> None:
        """End the worker thread and free the model."""
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)
        await asyncio.to_thread(self._waiter.shutdown, wait=True, cancel_futures=True)
        self._model = self._head = self._backbone = self._classifier = self._chain = self._library = None

    def _load(self) -> None:
        if self._threads is not None:
            # It takes effect only in the thread that calls it: the worker.
            torch.set_num_threads(self._threads)
        spec = self._spec
        if spec.library_model:
            self._library = LibraryModel(spec, _DTYPES[self.dtype], self._device)
            if self._sized:
                self.batch_tokens = _batch_tokens(self._library.transformer)
            if self._packed:
                log.info("batches are padded: sentence-transformers runs the whole model", model=spec.name)
            return
        loader: Any = AutoModelForSequenceClassification
        if spec.kind == "bi-encoder" or spec.chain:
            loader = AutoModel
        if spec.answers is not None:
            loader = AutoModelForCausalLM
        try:
            model, report = loader.from_pretrained(
                spec.path,
                dtype=_DTYPES[self.dtype],
                local_files_only=True,
                trust_remote_code=spec.trust_remote_code,
                weights_only=True,
                output_loading_info=True,
            )
        except pickle.UnpicklingError as error:
            raise UnsupportedModelError(
                f"{spec.name}: its weights in pytorch_model.bin hold Python objects other than tensors, which could "
                "run code; save the model as safetensors"
            ) from error
        # Pooling happens here, so a bi-encoder's own pooler is not needed; sentence-transformers does not save it.
        check_weights(spec, report, headless=loader is AutoModel)
        in_one_format(model, _DTYPES[self.dtype])
        model = merge_adapter(spec, model)
        self._padding = model.config.pad_token_id or 0
        model = model.eval().requires_grad_(False)
        if spec.answers is not None:
            model.config.use_cache = False
            self._head = answer_head(model, spec.answers)
            if self._head is None:
                self._answers = narrow_to_answers(model, spec.answers)
            else:
                model = model.base_model
        elif spec.kind == "causal-reranker":
            # The classifier finds the last token by the padding's id, which may also be the template's last token.
            model, self._head = model.model, model.score.weight[0].float()
        elif spec.chain:
            self._chain = ModuleChain(spec).to(self._device)
        self._model = model.to(self._device)
        if self._sized:
            self.batch_tokens = _batch_tokens(model)
        if self._head is not None:
            self._head = self._head.detach().to(self._device)
        if self._packed and (spec.answers is None or self._head is not None):
            self._pack(model)
        if spec.kind == "cross-encoder" and self._chain is None and self._classifier is None:
            head_in_float32(model)

    def _pack(self, model: Any) -> None:
        """Compute packed batches from now on, if the model's numbers stay the same."""
        if self._spec.kind == "causal-reranker":
            model.config.use_cache = False
        with torch.inference_mode():
            try:
                if self._spec.kind == "cross-encoder" and self._chain is None:
                    self._classifier = pack_classifier(model)
                else:
                    self._backbone = pack_backbone(model)
                backbone = self._backbone if self._classifier is None else self._classifier.backbone
                if self._compile and backbone is not None:
                    error = backbone.compile()
                    self._compiled = error is None
                    if error is not None:
                        reason = f"{type(error).__name__}: {error}"[:500]
                        log.warning("the model's layers could not be compiled; it is slower without", error=reason)
            except torch.OutOfMemoryError:
                log.warning("no memory for a float32 copy that proves packed batches right; batches are padded")
        if self._classifier is None and self._backbone is None:
            log.info("batches are padded: packed ones would change this model's numbers", model=self._spec.name)

    def _forward(self, sequences: list[TokenSequence]) -> _Pending:
        """Begin a batch. A batch that does not fit into memory is halved until its parts fit."""
        if self._death is not None:
            raise self._death
        pending = self._begin(sequences)
        if pending is not None:
            return pending
        # A batch that failed has no frames left here, so that its tensors are free.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(len(sequence.ids) for sequence in sequences)
        log.warning("batch out of memory", sequences=len(sequences), longest=longest, device=str(self._device))
        if len(sequences) == 1:
            raise EngineMemoryError(_no_memory(longest, self._device), np.full(1, np.nan, dtype=np.float32))
        half = len(sequences) // 2
        parts: list[NDArray[np.float32]] = []
        error: EngineMemoryError | None = None
        for part in (sequences[:half], sequences[half:]):
            try:
                parts.append(self._wait(self._forward(part)))
            except EngineMemoryError as failed:
                parts.append(failed.values)
                error = failed
        shapes = {part.shape[1:] for part in parts if np.isfinite(part).any()}
        if len(shapes) == 1:
            # A part without any result has no row shape of its own.
            (row,) = shapes
            parts = [
                part if part.shape[1:] == row else np.full((len(part), *row), np.nan, np.float32) for part in parts
            ]
        joined = np.concatenate(parts)
        if error is not None:
            raise EngineMemoryError(str(error), joined)
        return _Pending(torch.from_numpy(joined), None)

    def _begin(self, sequences: list[TokenSequence]) -> _Pending | None:
        """Compute a batch, or on a GPU queue its kernels; ``None`` if it does not fit into memory."""
        try:
            with torch.inference_mode():
                values = self._compute(sequences).float()
                if self._device.type != "cuda":
                    return _Pending(values.cpu(), None)
                host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                host.copy_(values, non_blocking=True)
                ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                ready.record()
                return _Pending(host, ready)
        except (RuntimeError, MemoryError) as error:
            if _is_out_of_memory(error):
                return None
            self._die_of(error)
            raise

    def _wait(self, pending: _Pending) -> NDArray[np.float32]:
        """Return a batch's results once they are in the CPU's memory."""
        if pending.ready is not None:
            try:
                pending.ready.synchronize()
            except RuntimeError as error:
                self._die_of(error)
                raise
        return pending.values.numpy()

    def _die_of(self, error: Exception) -> None:
        """Raise ``EngineDeadError`` if an error says that the device has failed for good."""
        if self._device.type != "cpu" and f"{self._device.type} error" in str(error).lower():
            self._death = EngineDeadError(f"the device failed: {error}")
            raise self._death from error

    def _compute(self, sequences: list[TokenSequence]) -> torch.Tensor:
        """Scores, shape ``(n,)``, or embeddings, shape ``(n, dim)``, on the device."""
        if self._library is not None:
            return self._library(sequences)
        if self._classifier is not None:
            return self._classifier(Packed.of(sequences, self._device))
        if self._backbone is not None:
            return self._from_packed(self._backbone, Packed.of(sequences, self._device))
        return self._from_padded(sequences)

    def _from_packed(self, backbone: PackedBackbone, batch: Packed) -> torch.Tensor:
        tokens = backbone(batch)  # (T, hidden)
        last = batch.bounds[1:] - 1
        if self._head is not None:
            return tokens[last].float() @ self._head
        if self._chain is not None:
            return self._chain.packed(tokens, batch)
        pooling = self._spec.pooling
        if pooling == "cls":
            pooled = tokens[batch.bounds[:-1]].float()
        elif pooling == "lasttoken":
            pooled = tokens[last].float()
        else:
            reduce = "max" if pooling == "max" else "mean"
            pooled = torch.segment_reduce(tokens.float(), reduce, lengths=batch.bounds.diff(), unsafe=True)
        return self._embeddings(pooled)

    def _embeddings(self, pooled: torch.Tensor) -> torch.Tensor:
        """The dimensions that are used, shape ``(n, dim)``, of pooled vectors ``(n, hidden)``."""
        used = pooled[:, : self._spec.dimensions]
        return functional.normalize(used, dim=1) if self._spec.normalized else used

    def _from_padded(self, sequences: list[TokenSequence]) -> torch.Tensor:
        assert self._model is not None, "run() before start()"
        lengths = torch.tensor([len(sequence.ids) for sequence in sequences])
        longest = int(lengths.max())
        ids = np.full((len(sequences), longest), self._padding, dtype=np.int64)
        types = np.zeros((len(sequences), longest), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.ids)] = sequence.ids
            types[row, sequence.first_segment : len(sequence.ids)] = 1
        mask = to_device((torch.arange(longest)[None] < lengths[:, None]).long(), self._device)  # (n, longest)
        inputs: dict[str, Any] = {
            "input_ids": to_device(torch.from_numpy(ids), self._device),
            "attention_mask": mask,
        }
        if types.any():
            inputs["token_type_ids"] = to_device(torch.from_numpy(types), self._device)
        if self._chain is not None:
            return cast(torch.Tensor, self._chain(self._model(**inputs).last_hidden_state, mask))  # (n,)
        if self._spec.kind == "cross-encoder":
            return cast(torch.Tensor, self._model(**inputs).logits[:, 0])  # (n,)
        if self._answers is not None and self._head is None:
            return answer_scores(self._model, self._answers, inputs["input_ids"], mask)
        if self._spec.model_type == "qwen3":
            inputs["use_cache"] = False
        tokens: torch.Tensor = self._model(**inputs).last_hidden_state.float()  # (n, longest, hidden)
        last = to_device(lengths, self._device) - 1
        if self._head is not None:
            return tokens[torch.arange(len(tokens)), last] @ self._head  # (n,)
        assert self._spec.pooling is not None
        pooled = _pool(tokens, mask, last, self._spec.pooling)
        return self._embeddings(pooled)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch that has begun.

    Attributes:
        values: Its results in the CPU's memory, shape ``(n, ...)``; unfinished before ``ready``.
        ready: Event after which ``values`` is finished; ``None`` if it is already.
    """

    values: torch.Tensor
    ready: torch.cuda.Event | None


def _batch_tokens(model: torch.nn.Module) -> int:
    """Tokens of a batch that a GPU computes in some tens of milliseconds.

    A longer batch would hold up an interactive call. A shorter one would not pay for its launch.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in embeddings)
    tokens = _BATCH_OPERATIONS / (2 * max(weights, 1))
    return int(min(max(tokens, _LEAST_BATCH_TOKENS), _MOST_BATCH_TOKENS))


def _pool(tokens: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector a text, shape ``(batch, hidden)``, from token vectors of shape ``(batch, longest, hidden)``."""
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "lasttoken":
        return tokens[torch.arange(len(tokens)), last]
    if pooling == "max":
        return tokens.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)
    return (tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _is_out_of_memory(error: BaseException) -> bool:
    # Not every allocation raises OutOfMemoryError: those of a CPU and of cuBLAS raise a RuntimeError.
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in _MEMORY_WORDS)


def _no_memory(tokens: int, device: torch.device) -> str:
    return (
        f"the memory of {device.type} does not suffice for an input of {tokens} tokens; shorten the texts, lower "
        "max_length, or serve the model on a larger device"
    )
