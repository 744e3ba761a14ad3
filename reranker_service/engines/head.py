"""Head in float32: the modules behind a transformer's backbone compute in float32, whatever the backbone's format.

Scores in 16 bits have few values: bfloat16 has 128 between 1 and 2, so that documents tie.
"""

from __future__ import annotations

from typing import Any

import torch


def head_in_float32(model: Any) -> None:
    """Let the head of a model of transformers compute in float32; the backbone keeps its format.

    The head is all that the model has beside its backbone, and the backbone's pooler. What the model's own code
    computes from the backbone's output, such as a mean of token vectors, is in float32 as well. A model whose code does
    not tell a backbone apart is left as it was.

    Args:
        model: A ``*ForSequenceClassification``; changed in place.
    """
    backbone = model.base_model
    if backbone is model:
        return
    widen_output(backbone)
    for module in model.children():
        if not any(part is backbone for part in module.modules()):
            _compute_in_float32(module)
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, torch.nn.Module):
        _compute_in_float32(pooler)


def widen_output(module: torch.nn.Module) -> None:
    """Let a module give float32 tensors whatever its format: a tensor, a tuple or a dict of them."""
    module.register_forward_hook(_output_in_float32)


def _compute_in_float32(module: torch.nn.Module) -> None:
    module.float()
    module.register_forward_pre_hook(_input_in_float32)


def _input_in_float32(_: torch.nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_widened(value) for value in values)


def _output_in_float32(_: torch.nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, dict):
        for name, value in output.items():
            output[name] = _widened(value)
        return output
    return tuple(_widened(value) for value in output) if isinstance(output, tuple) else _widened(output)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
