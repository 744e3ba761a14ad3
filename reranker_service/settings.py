"""Settings of the server. Each field is a flag and an environment variable ``RERANKER_*``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from .observing.logs import REPLICA_VARIABLE
from .rpc.limits import Limits


class Settings(BaseSettings):
    """Serve a reranker over gRPC.

    Every flag is also an environment variable: --max-length is RERANKER_MAX_LENGTH, --limits.max-text-bytes is
    RERANKER_LIMITS__MAX_TEXT_BYTES. A flag overrides its variable.

    Commands: reranker-service serve (the default), check MODEL, health ADDRESS, bench ADDRESS, top ADDRESS;
    each has its own --help.
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
        description="model to serve: a directory, or a hub name owner/model; if not given, the installed weights of "
        "all-MiniLM-L6-v2",
    )
    kind: Literal["cross-encoder", "causal-reranker", "bi-encoder"] | None = Field(
        None, description="kind of the model; if not given, the model's own files decide"
    )
    family: str | None = Field(
        None,
        description="family of a causal reranker whose files do not say how it reads a pair: qwen3-reranker, "
        "mxbai-rerank-v2 or bge-reranker-v2-gemma; if not given, the model's own files or its hub name decide",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of --model on the hub; if not given, its main branch"
    )
    trust_remote_code: bool = Field(
        False,
        description="run Python code that the model's directory holds, with the rights of the server; some models need "
        "it. Read the code first",
    )
    adapter: Path | None = Field(
        None,
        description="torch engine only: directory of a PEFT adapter, such as LoRA, that is merged into the model's "
        "weights at start",
    )
    prompts: dict[str, str] = Field(
        default_factory=dict,
        description='prompts by name, as JSON, such as {"query": "query: "}; they replace those of the model\'s own '
        "files under the same names",
    )
    engine: Literal["auto", "torch", "vllm"] = Field(
        "auto", description="engine that computes the scores; auto: vllm if it is installed, otherwise torch"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 listens on every interface")
    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0 picks a free port")
    tls_cert: Path | None = Field(
        None,
        description="PEM file of the server's certificate, with intermediate ones after it; turns TLS on; read again "
        "when it changes, like the other files of keys and tokens",
    )
    tls_key: Path | None = Field(None, description="PEM file of the private key of --tls-cert, without a passphrase")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authorities that sign client certificates; clients then need one: mutual TLS",
    )
    token_file: Path | None = Field(
        None,
        description="file of tokens, one on a line: NAME TOKEN, or NAME sha256:HEX; every call but health checks then "
        "needs one",
    )
    insecure_network: bool = Field(
        False,
        description="listen beyond this machine without TLS and tokens, and without mutual TLS: every program that "
        "reaches the port may use the server and read what others send",
    )
    reflection: bool = Field(
        False,
        description="answer reflection without a token, also beyond this machine; otherwise it needs a token or a "
        "client certificate, and is open only on a loopback address without --token-file",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="number format of the computation; auto: float32 on a CPU; on a GPU that of the checkpoint, and "
        "float16 if that is float32",
    )
    device: str = Field(
        "auto",
        description="device, such as cpu, cuda or cuda:1; auto: the GPU if there is one. vLLM takes auto, cuda and "
        "cuda:N",
    )
    replicas: Literal["auto"] | PositiveInt = Field(
        1,
        description="servers to start, each pinned to a device of its own, at --port and the ports after it; auto: one "
        "for each visible GPU, or one on a CPU. A server that dies is started again",
    )
    threads: int | None = Field(
        None, ge=1, description="torch engine only: CPU threads of one operation; if not given, torch decides"
    )
    compile: bool = Field(
        True,
        description="torch engine on a GPU only: compile the model's layers at start, which takes up to half a minute "
        "and makes small models, and those with rotary positions, faster",
    )
    default_length: int | None = Field(
        None,
        ge=1,
        description="length limit, in tokens, of requests that set none; if not given, the limit that the model's own "
        "files set, at most --max-length",
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="largest length limit, in tokens, that a request may set; if not given, the longest input that the "
        "model takes",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="vllm engine only: arguments for vLLM's AsyncEngineArgs, as JSON, such as "
        '{"max_model_len": 2048}; they override the choices of the server',
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port, on the same host and with the same TLS and tokens, that serves metrics for Prometheus; 0 "
        "picks a free port; if not given, there are no metrics",
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="second port, on the same host and without TLS, that answers gRPC health checks and no other call, "
        "for probes that speak no TLS, such as those of Kubernetes; 0 picks a free port; if not given, only --port "
        "answers them",
    )
    tracing: bool = Field(
        False,
        description="record an OpenTelemetry span for every call; the OTEL_* variables say where the spans are sent",
    )
    cache_bytes: int = Field(
        256 << 20, ge=0, description="size of the cache of scores in memory, in bytes; 0 turns this cache off"
    )
    cache_dir: Path | None = Field(
        None,
        description="directory of a cache of scores on disk, which outlives the server and may be shared by the "
        "servers of one machine; if not given, there is none",
    )
    cache_dir_bytes: int = Field(
        16 << 30,
        ge=1 << 20,
        description="largest size of the cache on disk, in bytes; a full cache drops the model that was used least "
        "recently and, without one, takes no new scores",
    )
    graceful_timeout: float = Field(
        30.0, ge=0, description="seconds that calls in flight may take to finish after SIGTERM or SIGINT"
    )
    stall_seconds: float = Field(
        300.0,
        ge=0,
        description="seconds in which the engine holds work and finishes none of it, after which health is NOT_SERVING "
        "until it finishes some; 0 turns this watchdog off",
    )
    max_concurrent_rpcs: int = Field(
        4096,
        ge=1,
        description="most scoring calls in flight; a further one is refused with RESOURCE_EXHAUSTED. Health checks, "
        "reflection and GetModelInfo do not count",
    )
    accept_compressed: bool = Field(
        False,
        description="accept compressed messages; without it they are refused with UNIMPLEMENTED, because a small "
        "message can grow to --limits.max-message-bytes",
    )
    memory_bytes: int = Field(
        2 << 30,
        ge=1 << 20,
        description="most bytes that the server holds for all clients: texts, token ids, embeddings, chunks in flight "
        "and replies that were not read. Without room, unary calls are refused with RESOURCE_EXHAUSTED, and streams "
        "wait",
    )
    max_streams: int = Field(
        1024, ge=1, description="most streams open at once; a further stream is refused with RESOURCE_EXHAUSTED"
    )
    stream_idle_seconds: float = Field(
        300.0,
        gt=0,
        description="seconds after which a stream ends if no message moves on it and nothing of it is being computed",
    )
    max_connection_calls: int = Field(
        1024, ge=1, description="most calls at once on one connection; the client's gRPC holds further calls back"
    )
    max_metadata_bytes: int = Field(
        8192, ge=1024, le=1 << 24, description="largest metadata of a call, in bytes; gRPC refuses larger metadata"
    )
    preferred_chunk_pairs: int = Field(
        0,
        ge=0,
        le=1 << 22,
        description="pairs of a chunk that clients are advised to send; 0: no preference. A larger number than "
        "--limits.max-pairs-per-chunk counts as that limit",
    )
    bulk_share: float = Field(
        0.1,
        ge=0,
        le=0.9,
        description="part of the engine that bulk work gets, by tokens, while interactive work waits all the time; 0: "
        "none, interactive work overtakes all bulk work",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level of events that are logged"
    )
    log_format: Literal["logfmt", "json"] = Field("logfmt", description="format of a log line")
    limits: Limits = Field(default_factory=Limits, description="limits of requests and streams, which clients see")


# Kubernetes sets these in every pod of a namespace with a Service named "reranker" or "reranker-...": RERANKER_PORT,
# RERANKER_PORT_50051_TCP_ADDR, RERANKER_SERVICE_HOST, RERANKER_SERVICE_PORT_GRPC.
_SERVICE_LINK = re.compile(
    r"RERANKER_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def variable_errors(environment: Iterable[tuple[str, str]]) -> list[str]:
    """Find variables ``RERANKER_*`` that set nothing. Those of the client, ``RERANKER_CLIENT_*``, may be set.

    Args:
        environment: Names and values of the environment's variables.

    Returns:
        A message for each unknown variable, which names the nearest known one, and one message for all variables that
        come from a Service of Kubernetes.
    """
    known = {f"RERANKER_{name}".upper() for name in Settings.model_fields}
    known |= {f"RERANKER_LIMITS__{name}".upper() for name in Limits.model_fields}
    messages, links = [], []
    for name, value in environment:
        upper = name.upper()
        if not upper.startswith("RERANKER_") or upper.startswith("RERANKER_CLIENT_") or upper == REPLICA_VARIABLE:
            continue
        if _SERVICE_LINK.fullmatch(upper) or _SERVICE_ADDRESS.match(value):
            links.append(name)
        elif upper not in known:
            nearest = difflib.get_close_matches(upper, sorted(known), n=1, cutoff=0.0)[0]
            messages.append(f"{name}: there is no such setting; the nearest is {nearest}")
    if links:
        messages.append(
            f"{', '.join(sorted(links))}: Kubernetes sets these for a Service whose name begins with reranker; set "
            "enableServiceLinks: false in the pod's spec, or give the Service another name"
        )
    return messages
