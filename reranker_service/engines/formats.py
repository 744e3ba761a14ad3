"""Number format of a model on a GPU if the settings name none: the one that vLLM decides for the checkpoint."""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoConfig

from ..models import ModelSpec

Format = Literal["float32", "bfloat16", "float16"]

# As in vLLM, whose reason is numerical instability.
_NO_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
_BFLOAT16_CAPABILITY = (8, 0)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device that is no CPU computes in bfloat16; NVIDIA's do from compute capability 8.0 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _BFLOAT16_CAPABILITY


def auto_format(spec: ModelSpec, bfloat16: bool) -> Format:
    """The checkpoint's own format if it has 16 bits and the device has it, and float16 for a checkpoint in float32.

    Args:
        spec: The model.
        bfloat16: Whether the device computes in bfloat16.
    """
    usable: list[Format] = ["bfloat16"] if bfloat16 else []
    if spec.model_type not in _NO_FLOAT16:
        usable.insert(0, "float16")
    saved = str(_saved_format(spec)).removeprefix("torch.")
    return next((one for one in usable if one == saved), usable[0] if usable else "float32")


def in_one_format(model: Any, dtype: torch.dtype) -> None:
    """Give all weights the format that a model of transformers was loaded in; changed in place.

    Code that makes a weight in float32 by name keeps it in float32 when it is loaded: two biases of DeBERTa's first
    version, whose products with others then fail. Models that ask for modules in float32 are left as they are.
    """
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if not any(getattr(model, name, None) for name in kept):
        # Buffers keep their format: rotary angles need float32.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def _saved_format(spec: ModelSpec) -> torch.dtype:
    config: Any = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    found = set()
    for path in spec.path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return reduce(torch.promote_types, [known[one] for one in found if one in known] or [torch.float32])
