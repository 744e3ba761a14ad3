"""Models and servers that many tests share; each is made once, when a test first uses it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models of the tests are too small for several threads, and processes with spinning threads slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from examples.processes import Child
from reranker.v1 import reranker_pb2_grpc as rpc

from . import models
from .forked import ForkedProgram
from .servers import ServerProcess

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Two workers finish at about the same time if the longest files begin first.
_LONGEST = (
    *("test_vllm_engine", "test_default_server", "test_dashboard", "test_quality", "test_loss_surroundings"),
    *("test_demo", "test_packaging", "test_bench_loss", "test_example_mining", "test_benchmarks", "test_gather"),
    "test_chaos",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the files into order."""
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT cross-encoder with random weights."""
    return models.build_bert_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="session")
def causal_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-Reranker with random weights, in the original checkpoint's layout."""
    return models.build_qwen3_reranker(tmp_path_factory.mktemp("causal-reranker"))


@pytest.fixture(scope="session")
def bi_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence-transformers model with random weights."""
    return models.build_bi_encoder(tmp_path_factory.mktemp("bi-encoder"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the models of a file's tests."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def shared_model(directory: Path) -> SentenceTransformer:
    """The student of a file's tests, with dropout."""
    from .training import student  # imports torch

    return student(directory)


@pytest.fixture
def model(shared_model: SentenceTransformer) -> Iterator[SentenceTransformer]:
    """The student of a file's tests, dropout off."""
    shared_model.eval()
    yield shared_model
    shared_model.zero_grad()


def _server(model: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--model", str(model), "--engine", "torch", "--threads", "1") as server:
        yield server


@pytest.fixture(scope="session")
def cross_encoder_server(cross_encoder: Path) -> Iterator[ServerProcess]:
    """The tiny cross-encoder, served by the real program."""
    yield from _server(cross_encoder)


@pytest.fixture(scope="session")
def causal_reranker_server(causal_reranker: Path) -> Iterator[ServerProcess]:
    """The tiny causal reranker, served by the real program."""
    yield from _server(causal_reranker)


@pytest.fixture(scope="session")
def bi_encoder_server(bi_encoder: Path) -> Iterator[ServerProcess]:
    """The tiny bi-encoder, served by the real program."""
    yield from _server(bi_encoder)


@pytest.fixture
def forked_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes that examples, benchmarks and the quality study start, with their libraries imported."""
    monkeypatch.setattr(Child, "popen", ForkedProgram)


@pytest.fixture
def stub(cross_encoder_server: ServerProcess) -> Iterator[rpc.RerankerServiceStub]:
    """A plain gRPC stub of the cross-encoder's server."""
    with grpc.insecure_channel(cross_encoder_server.address) as channel:
        yield rpc.RerankerServiceStub(channel)
