"""Packed batches: sequences back to back in one row, without padding, with attention of variable length.

A padded batch computes every sequence at the length of the longest one. A packed batch computes only the tokens that
there are. Attention is told where each sequence begins: by flash attention on a GPU, and by an explicit block-diagonal
mask elsewhere, which tests use.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models import TokenSequence

_NAME = "reranker_packed"
# The kernel computes in these formats only.
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_TOLERANCE = 1e-4
# Errors of a model that cannot be packed in the way that is tried.
_MISFITS = (TypeError, IndexError, ValueError, RuntimeError)
# Lengths of the sequences of the proof: the shortest, odd ones, and one longer than a window of local attention.
_PROOF_LENGTHS = (2, 61, 3, 170, 17)


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed batch of ``n`` sequences with ``T`` tokens together.

    Attributes:
        ids: Token ids, int64, shape ``(1, T)``.
        positions: Position of each token in its sequence, from 0, int64, shape ``(1, T)``.
        types: Segment of each token, 0 or 1, int64, shape ``(1, T)``; ``None`` if all are 0.
        bounds: Index of each sequence's first token, and ``T`` at the end, int32, shape ``(n + 1,)``.
        owners: Index of each token's sequence, int64, shape ``(T,)``.
        longest: Tokens of the longest sequence.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    types: torch.Tensor | None
    bounds: torch.Tensor
    owners: torch.Tensor
    longest: int

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], device: torch.device) -> Packed:
        """Pack sequences; the transfer to a GPU does not wait for the work that the GPU has already."""
        lengths = np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        total = int(bounds[-1])
        host = np.empty((4, total), dtype=np.int64)
        ids, positions, types, owners = host
        np.concatenate([sequence.ids for sequence in sequences], out=ids)
        owners[:] = np.repeat(np.arange(len(sequences)), lengths)
        positions[:] = np.arange(total) - bounds[owners]
        segments = np.array([sequence.first_segment for sequence in sequences], dtype=np.int64)
        types[:] = positions >= segments[owners]
        table, starts = to_device(torch.from_numpy(host), device), to_device(torch.from_numpy(bounds), device)
        return cls(
            ids=table[0][None],
            positions=table[1][None],
            types=table[2][None] if (segments < lengths).any() else None,
            bounds=starts.int(),
            owners=table[3],
            longest=int(lengths.max()),
        )

    def inputs(self, first_position: int) -> dict[str, Any]:
        """Arguments of a transformers model; ``first_position`` is the model's number of a first position."""
        inputs: dict[str, Any] = {
            "input_ids": self.ids,
            "position_ids": self.positions + first_position,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }
        if self.types is not None:
            inputs["token_type_ids"] = self.types
        return inputs

    def unpack(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded token vectors ``(n, longest, hidden)`` and mask ``(n, longest)`` of token vectors ``(T, hidden)``."""
        rows = len(self.bounds) - 1
        places = self.owners * self.longest + self.positions[0]
        padded = tokens.new_zeros(rows * self.longest, tokens.shape[-1]).index_copy_(0, places, tokens)
        mask = torch.arange(self.longest, device=tokens.device)[None] < self.bounds.diff()[:, None]
        return padded.view(rows, self.longest, -1), mask.long()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU's memory to a device; the copy to a GPU is queued behind its work, not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def kernel_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has attention of variable length, sliding windows included, for this device and format."""
    return (
        device.type == "cuda"
        and dtype in KERNEL_DTYPES
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and _VARLEN is not None
    )


def _find_varlen() -> Callable[..., torch.Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Without it, the function knows no sliding windows.
    known = "window_size" in inspect.signature(varlen_attn).parameters
    return cast("Callable[..., torch.Tensor]", varlen_attn) if known else None


_VARLEN = _find_varlen()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a packed batch; see ``transformers.AttentionInterface``.

    Args:
        module: The layer; its ``is_causal`` holds unless the argument is given.
        query: Shape ``(1, heads, T, head size)``; ``key`` and ``value`` may have fewer heads.
        key: See ``query``.
        value: See ``query``.
        attention_mask: Ignored: packed batches have no padding.
        scaling: Factor of the products; ``None`` for one over the root of the head size.
        sliding_window: Tokens to each side that a token attends to, itself included; ``None`` for all.
        softcap: Unsupported.
        is_causal: Whether a token attends to earlier ones only.
        cu_seq_lens_q: :attr:`Packed.bounds`.
        max_length_q: :attr:`Packed.longest`.

    Returns:
        The result, shape ``(1, T, heads, head size)``, and no weights.
    """
    if softcap is not None or cu_seq_lens_q is None:
        raise ValueError("packed attention needs the sequences' bounds, and has no softcap")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    reach = -1 if sliding_window is None else sliding_window - 1
    window = (reach, 0 if causal else reach)
    if query.is_cuda and query.dtype in KERNEL_DTYPES:
        assert _VARLEN is not None
        queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, size)
        if (groups := queries.shape[1] // keys.shape[1]) > 1:
            keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        bounds, most = cu_seq_lens_q, max_length_q
        found = _VARLEN(queries, keys, values, bounds, bounds, most, most, scale=scaling, window_size=window)
        return found[None], None
    mask = _block_diagonal(cu_seq_lens_q, query.shape[2], window)
    grouped = query.shape[1] != key.shape[1]
    result = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return result.transpose(1, 2), None


def _block_diagonal(bounds: torch.Tensor, total: int, window: tuple[int, int]) -> torch.Tensor:
    """Mask, shape ``(T, T)``: true where a token (row) attends to another one (column)."""
    at = torch.arange(total, device=bounds.device)
    owner = torch.searchsorted(bounds, at, right=True)
    mask = owner[:, None] == owner[None]
    apart = at[None] - at[:, None]  # positive where the column comes later
    left, right = window
    if left >= 0:
        mask &= apart >= -left
    if right >= 0:
        mask &= apart <= right
    return mask


AttentionInterface.register(_NAME, _attention)


class _Given(torch.nn.Module):
    """Stands in for a model's backbone and returns an output that was computed before."""

    output: BaseModelOutputWithPooling | None = None

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPooling | None:
        return self.output


class ClassifierHead:
    """The part of a sequence classifier behind its backbone, in float32 whatever the backbone's format.

    The head is the model's own code: its backbone is replaced by one that returns given token vectors.
    """

    def __init__(self, model: Any) -> None:
        """Copy the head of a ``*ForSequenceClassification``; the model stays as it is."""
        self._place = model.base_model_prefix
        backbone = getattr(model, self._place)
        setattr(model, self._place, _Given())
        try:
            self._model = copy.deepcopy(model).float()
        finally:
            setattr(model, self._place, backbone)
        pooler = getattr(backbone, "pooler", None)
        self._pooler = None if pooler is None else copy.deepcopy(pooler).float()

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits, shape ``(n,)``, of token vectors ``(n, longest, hidden)`` with their mask ``(n, longest)``."""
        tokens = tokens.float()
        pooled = None if self._pooler is None else self._pooler(tokens)
        getattr(self._model, self._place).output = BaseModelOutputWithPooling(
            last_hidden_state=cast(Any, tokens), pooler_output=pooled
        )
        return cast(torch.Tensor, self._model(inputs_embeds=tokens, attention_mask=mask).logits[:, 0])


class PackedBackbone:
    """A transformers model without head that computes packed batches.

    Attributes:
        first_position: The model's number of a first position.
    """

    def __init__(self, model: Any, first_position: int) -> None:
        """Switch ``model`` to packed attention. Padded batches are wrong from then on."""
        model.set_attn_implementation(_NAME)
        self._model = model
        self.first_position = first_position

    def compile(self) -> Exception | None:
        """Compile the model's layers, and compute a batch with them, because compilation comes with the first batch.

        Returns:
            The error that compilation raised, if it failed: layers are not compiled then, in this whole process.
        """
        # The layers of a model have the same code, so that one compilation serves all of them, whatever their sizes.
        stacks = [module for module in self._model.modules() if isinstance(module, torch.nn.ModuleList)]
        for layer in max(stacks, key=len, default=()):
            layer.compile(dynamic=True)
        try:
            self(Packed.of(_proof_sequences(self._model.config), self._model.device))
        except Exception as error:  # a missing C compiler, a kernel that the GPU lacks, a fault of the compiler
            torch.compiler.set_stance("force_eager")
            return error
        return None

    def __call__(self, batch: Packed) -> torch.Tensor:
        """Token vectors, shape ``(T, hidden)``."""
        return cast(torch.Tensor, self._model(**batch.inputs(self.first_position)).last_hidden_state[0])


Reads = Literal["first", "all"]
"""Token vectors that a classifier's head needs: each sequence's first one, or all."""


@dataclass(frozen=True, slots=True)
class PackedClassifier:
    """A sequence classifier that computes packed batches."""

    backbone: PackedBackbone
    head: ClassifierHead
    reads: Reads

    def __call__(self, batch: Packed) -> torch.Tensor:
        """Logits, shape ``(n,)``, float32."""
        return _logits(self.head, self.backbone(batch), batch, self.reads)


def _logits(head: ClassifierHead, tokens: torch.Tensor, batch: Packed, reads: Reads) -> torch.Tensor:
    if reads == "all":
        return head(*batch.unpack(tokens))
    first = tokens[batch.bounds[:-1]][:, None]  # (n, 1, hidden)
    return head(first, torch.ones(first.shape[:2], dtype=torch.long, device=first.device))


def pack_classifier(model: Any) -> PackedClassifier | None:
    """Make a packed classifier of a ``*ForSequenceClassification``, if its logits stay the same; ``None`` if not.

    The numbering of positions and the tokens that the head reads are found by trial, in float32: the right ones give
    the logits that the model gives itself for each sequence alone.
    """
    if not getattr(model, "_supports_flash_attn", False):
        return None  # its attention is not exchangeable, or needs a bias for each pair of tokens
    trial = copy.deepcopy(model).float()
    sequences = _proof_sequences(trial.config)
    wanted = _alone(trial, sequences)
    head = ClassifierHead(trial)
    batch = Packed.of(sequences, trial.device)
    backbone = getattr(trial, trial.base_model_prefix)
    for first_position in _first_positions(trial.config):
        try:
            tokens = PackedBackbone(backbone, first_position)(batch)
        except torch.OutOfMemoryError:
            raise
        except _MISFITS:
            continue
        for reads in get_args(Reads):
            try:
                found = _logits(head, tokens, batch, reads)
            except _MISFITS:
                continue
            if _equal(found, wanted):
                place = getattr(model, model.base_model_prefix)
                own = ClassifierHead(model)
                return PackedClassifier(PackedBackbone(place, first_position), own, reads)
    return None


def pack_backbone(model: Any) -> PackedBackbone | None:
    """Make a packed model of one without head, if its token vectors stay the same; ``None`` if not."""
    if not getattr(model, "_supports_flash_attn", False):
        return None
    trial = copy.deepcopy(model).float()
    sequences = _proof_sequences(trial.config)
    wanted = _alone(trial, sequences)
    batch = Packed.of(sequences, trial.device)
    for first_position in _first_positions(trial.config):
        try:
            found = PackedBackbone(trial, first_position)(batch)
        except torch.OutOfMemoryError:
            raise
        except _MISFITS:
            continue
        if _equal(found, wanted):
            return PackedBackbone(model, first_position)
    return None


def _first_positions(config: Any) -> tuple[int, ...]:
    # RoBERTa and its descendants number positions from the padding's id + 1.
    return (0, config.pad_token_id + 1) if config.pad_token_id is not None else (0,)


def _proof_sequences(config: Any) -> list[TokenSequence]:
    """Sequences of random token ids, without padding's, of both segments if the model knows two."""
    generator = np.random.default_rng(0)
    positions = getattr(config, "max_position_embeddings", None) or max(_PROOF_LENGTHS)
    two_segments = getattr(config, "type_vocab_size", 0) > 1
    sequences = []
    for wanted in _PROOF_LENGTHS:
        length = max(min(wanted, positions - 8), 1)
        ids = generator.integers(config.vocab_size, size=length).astype(np.int32)
        ids[ids == config.pad_token_id] = (config.pad_token_id or 0) + 1
        sequences.append(TokenSequence(ids, length // 2 + 1 if two_segments else length))
    return sequences


def _alone(model: Any, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """The model's logits ``(n,)``, or its token vectors ``(T, hidden)``, for each of ``n`` sequences alone.

    A sequence without neighbours needs neither padding nor packing.
    """
    found = []
    for sequence in sequences:
        inputs = {"input_ids": torch.from_numpy(sequence.ids.astype(np.int64))[None].to(model.device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if sequence.first_segment < len(sequence.ids):
            types = torch.arange(len(sequence.ids), device=model.device) >= sequence.first_segment
            inputs["token_type_ids"] = types.long()[None]
        output = model(**inputs)
        found.append(output.logits[:, 0] if hasattr(output, "logits") else output.last_hidden_state[0])
    return torch.cat(found).float()


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        ((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max().clamp(min=1)).item()
    )
