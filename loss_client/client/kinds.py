"""Kinds of models: their names, and the scale of their raw scores."""

from __future__ import annotations

from loss_client.client.errors import IncompatibleServerError
from loss_client.client.scores import RawScale
from reranker.v1 import reranker_pb2 as pb

ModelInfo = pb.GetModelInfoResponse
"""A server's description of its model."""

_RAW_SCALES: dict[int, RawScale] = {
    pb.MODEL_KIND_CROSS_ENCODER: "logit",
    pb.MODEL_KIND_CAUSAL_RERANKER: "logit",
    pb.MODEL_KIND_BI_ENCODER: "cosine",
}


def raw_scale(info: ModelInfo) -> RawScale:
    """Return whether the raw scores of a model are logits or cosines.

    Raises:
        IncompatibleServerError: The server names a kind of model that this client does not know.
    """
    scale = _RAW_SCALES.get(info.kind)
    if scale is None:
        raise IncompatibleServerError(
            f"the server names kind {info.kind} for its model; this client knows only the kinds {sorted(_RAW_SCALES)} "
            "and cannot tell how their raw scores become probabilities: update the client"
        )
    return scale


def kind_name(info: ModelInfo) -> str:
    """Return the kind of a model as users write it: ``"cross-encoder"``, ``"causal-reranker"`` or ``"bi-encoder"``.

    Raises:
        ValueError: The contract of this client has no such kind.
    """
    return pb.ModelKind.Name(info.kind).removeprefix("MODEL_KIND_").replace("_", "-").lower()
