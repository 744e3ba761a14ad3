"""Commands of ``reranker-service``: ``serve``, ``bench`` and ``top``, against real servers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from loss_client import RerankerClient
from reranker_service.commands import bench, page, top

from . import forked
from .certificates import Authority
from .scrapes import scrape, scrape_text
from .servers import ServerProcess

TOKEN = "token-of-the-tests-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY"):
        monkeypatch.delenv(f"RERANKER_CLIENT_{name}", raising=False)


@pytest.fixture(scope="module")
def server(cross_encoder: Path) -> Iterator[ServerProcess]:
    flags = ("--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--metrics-port", "0")
    with ServerProcess(*flags) as server:
        yield server


@pytest.fixture(scope="module")
def secured(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    """A server with TLS and tokens, and a directory with ``ca.pem`` and ``token``."""
    directory = tmp_path_factory.mktemp("secured")
    cert, key = Authority(directory).issue("server")
    (directory / "tokens").write_text(f"tests {TOKEN}\n")
    (directory / "token").write_text(TOKEN)
    flags = ("--model", str(cross_encoder), "--engine", "torch", "--threads", "1", "--metrics-port", "0")
    files = ("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(directory / "tokens"))
    with ServerProcess(*flags, *files) as server:
        yield server, directory


def metrics_of(server: ServerProcess) -> str:
    return re.search(r"metrics=(\S+)", server.line("metrics="))[1]


def test_bench_counts_what_the_server_counts(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    before = scrape(server)
    assert bench.main([server.address, "--seconds", "1", "--document-words", "12", "--json"]) == 0
    grown = scrape(server) - before
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "cross-encoder"
    assert report["engine"] == "torch"
    assert report["cached_share"] == 0
    assert 0 < report["alone"]["p50"] <= report["alone"]["p95"]
    assert report["beside"]["calls"] >= 5
    assert report["pairs"] <= grown["reranker_pairs_total", "RerankStream"]
    # Random words of one token or more each, between [CLS] and [SEP]s.
    assert 12 + 10 + 3 <= report["tokens_per_pair"] <= 128
    # The stream ran for half of the second; its start does not count.
    assert report["pairs"] / 2 <= report["pairs_per_second"] * 1.0


def test_bench_reads_texts_and_names_truncation(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").write_text("one passage\n\n" + "long " * 100 + "\n")
    assert bench.main([server.address, "--seconds", "0.2", "--texts", str(tmp_path / "texts"), "--streams", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"streams  [\d,]+ pairs/s: 2 streams, .*% of the pairs were truncated", printed)
    assert len(printed.splitlines()) == 4


def test_bench_of_a_bi_encoder(bi_encoder_server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([bi_encoder_server.address, "--seconds", "0.2", "--document-words", "12"]) == 0
    assert ", a bi-encoder, on torch float32" in capsys.readouterr().out


def test_bench_goes_on_with_another_stream_at_the_limit_of_texts(
    cross_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--limits.max-texts-per-stream", "16", "--limits.max-chunks-per-stream", "8")
    with ServerProcess("--model", str(cross_encoder), "--engine", "torch", "--metrics-port", "0", *few) as server:
        assert bench.main([server.address, "--seconds", "0.4", "--document-words", "4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pairs"] > 2 * 64
        assert scrape(server)["reranker_requests_total", "RerankStream", "OK"] >= 1


def test_bench_and_top_use_tls_and_a_token(
    secured: tuple[ServerProcess, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, directory = secured
    flags = ["--tls-ca", str(directory / "ca.pem"), "--token-file", str(directory / "token")]
    assert bench.main([server.address, "--seconds", "0.1", "--document-words", "4", *flags]) == 0
    assert top.main([metrics_of(server), "--once", "--interval", "0.01", *flags]) == 0
    assert "serving" in capsys.readouterr().out
    assert bench.main([server.address, "--seconds", "0.1", *flags[:2]]) == 1
    assert "UNAUTHENTICATED" in capsys.readouterr().err
    monkeypatch.setenv("RERANKER_CLIENT_TLS_CA", str(directory / "ca.pem"))
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN", TOKEN)
    assert bench.main([f"grpcs://{server.address}", "--seconds", "0.1", "--document-words", "4"]) == 0
    assert top.main([f"https://{metrics_of(server)}", "--once", "--interval", "0.01"]) == 0
    monkeypatch.delenv("RERANKER_CLIENT_TOKEN")
    assert top.main([f"https://{metrics_of(server)}", "--once", "--interval", "0.01"]) == 1
    assert "401" in capsys.readouterr().out


@pytest.mark.parametrize("command", [bench, top])
def test_a_token_does_not_cross_a_network_in_plaintext(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with pytest.raises(SystemExit, match="2"):
        command.main(["192.0.2.1:50051", "--token-file", str(tmp_path / "token")])
    printed = capsys.readouterr().err
    assert "192.0.2.1:50051 is reached without TLS" in printed
    assert TOKEN not in printed


def test_bench_says_that_nothing_listens(capsys: pytest.CaptureFixture[str], unused_port: int) -> None:
    assert bench.main([f"127.0.0.1:{unused_port}"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.fixture
def unused_port() -> int:
    from chaos.servers import free_port

    return free_port()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "address 'nowhere' is not understood"),
        (["a:1", "--streams", "0"], "--streams is 0; it has to be above 0"),
        (["a:1", "--texts", "/there/is/none"], "cannot be read"),
        (["a:1", "--tls-ca", "/there/is/none"], "is no file"),
        (["a:1", "--tls-cert", __file__], "a client certificate needs its private key"),
    ],
)
def test_bench_refuses_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_the_figures_of_top_are_those_of_the_page(server: ServerProcess) -> None:
    before = page.parse(scrape_text(server))
    with RerankerClient(server.address) as client:
        client.rerank("query of top", ["one", "two", "three", "four"])
        client.rerank("query of top", ["one", "two", "three", "five"])
    now = page.parse(scrape_text(server))
    found = page.figures(before, now)
    assert found.state == "serving"
    assert found.cached_share == pytest.approx(3 / 8)
    assert found.pairs_per_second * (now.when - before.when) == pytest.approx(8)
    assert (found.waiting, found.running, found.streams) == (0, 0, 0)
    restarted = page.figures(page.Page(before.when, {"pairs_total": 1e9}, {"engine": 1e9}), now)
    assert restarted.pairs_per_second * (now.when - before.when) == pytest.approx(now.sums["pairs_total"])


def test_top_prints_a_row_for_each_address(
    server: ServerProcess, unused_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = [metrics_of(server), f"127.0.0.1:{unused_port}"]
    assert top.main([*addresses, "--once", "--interval", "0.05"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (up,), (down,) = ([line for line in lines if address in line] for address in addresses)
    assert up.split()[1] == "serving"
    assert "Connection refused" in down


def test_top_is_renewed_until_it_is_interrupted(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([None, None])

    def sleep(seconds: float) -> None:
        if next(left, "interrupt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    assert top.main([metrics_of(server)]) == 0
    assert "serving" in capsys.readouterr().out


def test_top_names_the_package_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "find_spec", lambda name: None if name == "rich" else util.find_spec(name))
    assert top.main(["localhost:9400"]) == 1
    assert capsys.readouterr().err == "reranker-service top needs rich: pip install 'reranker-grpc[top]'\n"


def test_commands_start_without_the_server() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['reranker-service', 'bench', '--help']\n"
        "from reranker_service.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'reranker_service.server'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: reranker-service bench")


def test_an_unknown_command_is_named() -> None:
    done = forked.run([sys.executable, "-m", "reranker_service", "bnech"], timeout=120)
    assert done.returncode == 2
    assert done.stderr == "reranker-service: there is no command 'bnech'; right are serve, check, health, bench, top\n"


def test_serve_takes_the_flags_of_the_bare_program() -> None:
    program = [sys.executable, "-m", "reranker_service"]
    bare, named = (forked.run([*program, *words, "--help"], timeout=120) for words in ((), ("serve",)))
    assert bare.returncode == named.returncode == 0
    assert bare.stdout == named.stdout
    assert "serve (the default), check MODEL, health ADDRESS, bench ADDRESS, top ADDRESS" in " ".join(
        bare.stdout.split()
    )
