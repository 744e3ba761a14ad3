"""Bi-encoders of the dot product: raw scores are the library's, and there is no probability."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.engines.vllm_arguments import check_supported
from reranker_service.models import TextLayout, UnsupportedModelError, make_layout, read_model
from tests import models, references
from tests.computing import compute
from tests.servers import ServerProcess
from tests.test_model import edit


def build(directory: Path, normalize: bool = False) -> Path:
    """Write a bi-encoder of the dot product with random weights."""
    model = models.build_bi_encoder(directory, normalize=normalize)
    edit(model / "config_sentence_transformers.json", similarity_fn_name="dot")
    return model


def test_raw_scores_are_dot_products_and_probabilities_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path)
    pairs = references.pairs()[:4]
    library = SentenceTransformer(str(model), device="cpu")
    documents = [document for _, document in pairs]
    wanted = library.similarity(library.encode_query([pairs[0][0]]), library.encode_document(documents))[0].numpy()
    with ServerProcess("--model", str(model), "--engine", "torch") as server:
        address = server.wait_ready()
        with grpc.insecure_channel(address) as channel:
            stub = rpc.RerankerServiceStub(channel)
            options = pb.RerankOptions(score_type=pb.SCORE_TYPE_RAW)
            response = stub.Rerank(pb.RerankRequest(query=pairs[0][0], documents=documents, options=options))
            scores = {result.index: result.score for result in response.results}
            np.testing.assert_allclose([scores[index] for index in range(4)], wanted, rtol=1e-5)
            assert np.abs(wanted).max() > 1.5, "the test's embeddings must be longer than 1"
            with pytest.raises(grpc.RpcError) as caught:
                stub.Rerank(pb.RerankRequest(query="a", documents=["b"]))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no probability is defined; set SCORE_TYPE_RAW" in caught.value.details()


def test_normalized_embeddings_have_cosines_whatever_the_similarity(tmp_path: Path) -> None:
    assert read_model(str(build(tmp_path, normalize=True))).normalized is True


@pytest.mark.parametrize("change", ["truncated", "widened"])
def test_embeddings_that_change_after_their_normalization_have_dot_products(change: str, tmp_path: Path) -> None:
    model = build(tmp_path / "plain", normalize=True)
    if change == "truncated":
        edit(model / "config_sentence_transformers.json", truncate_dim=16)
    else:
        base = SentenceTransformer(str(model), device="cpu")
        model = tmp_path / "saved"
        modules = [*base, Dense(models.HIDDEN, 16)]
        SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot").save_pretrained(str(model))
    spec = read_model(str(model))
    assert (spec.normalized, spec.library_model) == (False, True)
    layout = make_layout(spec)
    assert isinstance(layout, TextLayout)
    texts = [document for _, document in references.pairs(4)]
    inputs = [layout.single(one, spec.default_length)[0] for one in layout.encode_documents(texts)]

    found = compute(spec, inputs)
    np.testing.assert_allclose(found, SentenceTransformer(str(model), device="cpu").encode_document(texts), atol=1e-5)


def test_vllm_refuses_dot_products(tmp_path: Path) -> None:
    spec = read_model(str(build(tmp_path)))
    assert spec.normalized is False
    with pytest.raises(UnsupportedModelError, match="its scores are dot products of embeddings, and vLLM normalizes"):
        check_supported(spec)
    check_supported(replace(spec, normalized=True))
