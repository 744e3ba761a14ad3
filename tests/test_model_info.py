"""GetModelInfo describes the model as its own files do; sentence-transformers reads the same files as the reference."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.models import make_layout, read_model

from . import models
from .servers import ServerProcess
from .test_model import edit

PROMPTS = {"query": "query: ", "document": ""}


@pytest.mark.parametrize(("function", "name"), [(torch.nn.Sigmoid, "sigmoid"), (torch.nn.Identity, "identity")])
def test_a_saved_cross_encoder_names_activation_and_prompts(function: type, name: str, tmp_path: Path) -> None:
    model = CrossEncoder(
        str(models.build_bert_cross_encoder(tmp_path / "plain")),
        device="cpu",
        activation_fn=function(),
        prompts=PROMPTS,
        default_prompt_name="query",
    )
    model.save_pretrained(str(tmp_path / "saved"))
    saved = read_model(str(tmp_path / "saved")).saved
    reference = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(reference.activation_fn) is function
    assert saved.activation == name
    assert (saved.prompts, saved.default_prompt_name) == (reference.prompts, reference.default_prompt_name)
    assert saved.prompts == PROMPTS


@pytest.mark.parametrize(
    "older",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.0"}},
    ],
)
def test_older_versions_name_the_activation_in_the_configuration(older: dict[str, object], tmp_path: Path) -> None:
    model = models.build_bert_cross_encoder(tmp_path)
    assert read_model(str(model)).saved.activation is None
    edit(model / "config.json", **older)
    assert type(CrossEncoder(str(model), device="cpu").activation_fn) is torch.nn.Identity
    assert read_model(str(model)).saved.activation == "identity"


@pytest.mark.parametrize("named", ["cosine", "dot"])
def test_a_saved_bi_encoder_names_its_similarity(named: str, tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path)
    edit(model / "config_sentence_transformers.json", similarity_fn_name=named, prompts=PROMPTS)
    saved = read_model(str(model)).saved
    reference = SentenceTransformer(str(model), device="cpu")
    assert saved.similarity == named == reference.similarity_fn_name
    assert saved.prompts == reference.prompts


def test_only_causal_rerankers_have_a_template(cross_encoder: Path, causal_reranker: Path, bi_encoder: Path) -> None:
    found = [make_layout(read_model(str(one))).template for one in (cross_encoder, causal_reranker, bi_encoder)]
    assert found == [None, "qwen3-reranker", None]


def test_the_server_reports_what_the_files_say(tmp_path: Path) -> None:
    model = models.build_bi_encoder(tmp_path, pooling="cls", prompts=PROMPTS)
    edit(model / "config_sentence_transformers.json", similarity_fn_name="cosine", default_prompt_name="query")
    flags = ("--engine", "torch", "--threads", "1", "--preferred-chunk-pairs", "512")
    with ServerProcess("--model", str(model), *flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = rpc.RerankerServiceStub(channel)
        info = stub.GetModelInfo(pb.GetModelInfoRequest())
        (opened,) = stub.RerankStream(iter([pb.RerankStreamRequest(open=pb.StreamOpen())]), timeout=60)
    assert (info.pooling, info.similarity, info.default_prompt_name) == ("cls", "cosine", "query")
    assert dict(info.prompts) == PROMPTS
    assert not info.HasField("activation")
    assert not info.HasField("template")
    assert info.preferred_pairs_per_chunk == opened.opened.preferred_pairs_per_chunk == 512
    assert info.contract == pb.ContractVersion(major=1, minor=1)
