"""Every setting of the server: a flag, an environment variable ``RERANKER_*``, a type, a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from .rpc.limits import Limits


class Settings(BaseSettings):
    """Serve a reranker over gRPC.

    Every flag is also an environment variable: --max-length is RERANKER_MAX_LENGTH, --limits.max-text-bytes is
    RERANKER_LIMITS__MAX_TEXT_BYTES. A flag wins over a variable.
    """

    model_config = SettingsConfigDict(
        env_prefix="RERANKER_",
        env_nested_delimiter="__",
        cli_prog_name="reranker-service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        extra="forbid",
    )

    model: str | None = Field(
        None,
        description="directory or hub name of the model; without it, the all-MiniLM-L6-v2 weights that are installed",
    )
    kind: Literal["cross-encoder", "causal-reranker", "bi-encoder"] | None = Field(
        None, description="what sort of model it is; found from its files where not given"
    )
    engine: Literal["auto", "torch", "vllm"] = Field(
        "auto", description="what computes scores; auto: vllm where it is installed, else torch"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format of the computation; auto: float32 on a CPU, 16 bits on a GPU"
    )
    device: str = Field("auto", description="torch engine: cpu, cuda, cuda:1, ...; auto: a GPU where there is one")
    threads: int | None = Field(None, ge=1, description="torch engine: CPU threads; all cores where not given")
    max_length: int | None = Field(
        None, ge=1, description="length limit in tokens where a request sets none; the model's own where not given"
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description='vllm engine: arguments passed through, as JSON: {"max_model_len": 2048}'
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port for Prometheus, on the same host; 0 picks a free one; off where not given",
    )
    tracing: bool = Field(
        False, description="record a span for every call, with OpenTelemetry; OTEL_* variables say where spans go"
    )
    cache_bytes: int = Field(256 << 20, ge=0, description="memory for scores already known, in bytes; 0 keeps none")
    cache_dir: Path | None = Field(
        None, description="directory for scores that outlive the server; may be shared by servers of one machine"
    )
    cache_dir_bytes: int = Field(16 << 30, ge=1 << 20, description="most that cache-dir may grow to, in bytes")
    grace: float = Field(30.0, ge=0, description="seconds that calls in flight are given to finish at the end")
    max_calls: int = Field(
        4096, ge=1, description="calls under way at a time; one more is refused with RESOURCE_EXHAUSTED"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged, at least")
    log_format: Literal["logfmt", "json"] = Field("logfmt", description="form of a log line")
    limits: Limits = Field(default_factory=Limits, description="what requests may ask for")
