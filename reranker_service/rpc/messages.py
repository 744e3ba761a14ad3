"""Messages: converts plain values of the other rooms to messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping

from reranker.v1 import reranker_pb2 as pb

from ..scoring import OptionRanges, Usage
from .limits import Limits

CONTRACT = pb.ContractVersion(major=1, minor=1)
"""Version of the contract that this server speaks."""

_KINDS = {
    "cross-encoder": pb.MODEL_KIND_CROSS_ENCODER,
    "causal-reranker": pb.MODEL_KIND_CAUSAL_RERANKER,
    "bi-encoder": pb.MODEL_KIND_BI_ENCODER,
}


def model_info(
    *,
    model: str,
    kind: str,
    fingerprint: str,
    ranges: OptionRanges,
    limits: Limits,
    engine: str,
    dtype: str,
    versions: Mapping[str, str],
    activation: str | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    template: str | None = None,
    pooling: str | None = None,
    similarity: str | None = None,
    preferred_pairs_per_chunk: int = 0,
) -> pb.GetModelInfoResponse:
    """Make the reply of GetModelInfo.

    Args:
        model: The model's name.
        kind: "cross-encoder", "causal-reranker" or "bi-encoder".
        fingerprint: Hash of everything that scores depend on.
        ranges: Options that the model supports.
        limits: Limits of requests and streams.
        engine: The engine's name.
        dtype: Number format of the computation.
        versions: Distribution name to version of the libraries that compute, and of this server.
        activation: "sigmoid" or "identity"; ``None`` if the model's files name none.
        prompts: The model's prompts by name.
        default_prompt_name: Name of the prompt of callers that name none.
        template: Name of the template around query and document.
        pooling: The way in which a bi-encoder makes one vector of its token vectors.
        similarity: "cosine" or "dot"; ``None`` if the model's files name none of them.
        preferred_pairs_per_chunk: Pairs of a chunk with which the server is most efficient; 0 for no preference.
    """
    return pb.GetModelInfoResponse(
        model=model,
        kind=_KINDS[kind],
        fingerprint=fingerprint,
        min_length=ranges.min_length,
        max_length=ranges.max_length,
        default_length=ranges.default_length,
        supports_instruction=ranges.supports_instruction,
        default_instruction=ranges.default_instruction,
        limits=limits.to_message(),
        engine=engine,
        dtype=dtype,
        contract=CONTRACT,
        versions=versions,
        activation=activation,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        template=template,
        pooling=pooling,
        similarity=similarity,
        preferred_pairs_per_chunk=preferred_pairs_per_chunk,
    )


def usage_message(usage: Usage) -> pb.Usage:
    """Express the counts and times of a reply as a message of the contract."""
    return pb.Usage(
        pairs=usage.pairs,
        cached_pairs=usage.cached_pairs,
        shared_pairs=usage.shared_pairs,
        truncated_pairs=usage.truncated_pairs,
        tokens=usage.tokens,
        queue_seconds=usage.queue_seconds,
        engine_seconds=usage.engine_seconds,
    )
