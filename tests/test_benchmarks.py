"""Tests of the service benchmark: rounds, ratios and reports, and small runs over real sockets and processes."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import report
from benchmarks.causal import IdealPrefixCache
from benchmarks.gpu.command_line import main as on_gpu
from benchmarks.gpu.run import operations
from benchmarks.gpu.shapes import SHAPES, tiny
from benchmarks.proxy import CountingProxy
from benchmarks.report import Figure
from benchmarks.rounds import DisagreementError, Spread, contest
from benchmarks.service import PARTS, run, scale_for
from benchmarks.texts import Corpus, Grid
from examples.processes import Child, ProcessError, child


def grid(queries: int) -> Grid:
    return Grid(tuple(f"q{one}" for one in range(queries)), ("a", "b", "c", "d"))


class FakeSide:
    """Side that reports a set number of seconds a pair without spending them; logs each call that it receives."""

    def __init__(self, name: str, seconds_a_pair: float, log: list[str], score: float = 0.0) -> None:
        self.name = name
        self.seconds_a_pair = seconds_a_pair
        self.log = log
        self.value = score
        self.grids: list[Grid] = []

    def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
        self.log.append(f"{self.name} scores")
        self.grids.append(grid)
        shape = len(grid.queries), len(grid.documents)
        return self.seconds_a_pair * grid.pairs, np.full(shape, self.value, dtype=np.float32)

    def pause(self) -> None:
        self.log.append(f"{self.name} pauses")

    def resume(self) -> None:
        self.log.append(f"{self.name} resumes")


def test_sides_take_turns_with_the_same_pairs_while_the_others_rest() -> None:
    log: list[str] = []
    fast, slow = FakeSide("fast", 0.001, log), FakeSide("slow", 0.004, log)
    found = contest([fast, slow], grid, rounds=5, seconds=1.0)
    turn = [f"{name} {what}" for name in ("fast", "slow") for what in ("resumes", "scores", "pauses")]
    assert log == ["fast pauses", "slow pauses", *turn * (1 + 5)]
    assert fast.grids == slow.grids
    assert found.rates["fast"] == pytest.approx([1000] * 5)
    assert found.ratio("fast", "slow").value == pytest.approx(4.0)


def test_a_round_is_sized_to_fit_the_time() -> None:
    sides = [FakeSide("a", 0.001, []), FakeSide("b", 0.004, [])]
    # A query with 4 documents takes both sides together 20 ms, so 5 rounds of 10 queries take a second.
    assert contest(sides, grid, rounds=5, seconds=1.001).queries == [10] * 5
    assert contest(sides, grid, rounds=5, seconds=1e9).queries == [64] * 5
    assert contest(sides, grid, rounds=5, seconds=0.0).queries == [1] * 5


def test_rounds_become_smaller_on_a_machine_that_becomes_slower() -> None:
    class Tiring(FakeSide):
        def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
            seconds, scores = super().score(grid)
            return seconds * next(pace), scores

    pace = iter([1, 1, 4, 4, 4])
    # At 40 ms a query, 20 queries take 0.8 s; the second round takes 3.2 s at a quarter of the speed, which uses up
    # the time, so the last two rounds have one query each.
    found = contest([Tiring("tiring", 0.01, [])], grid, rounds=4, seconds=3.2001)
    assert found.queries == [20, 20, 1, 1]


def test_a_contest_between_sides_with_different_scores_is_refused() -> None:
    with pytest.raises(DisagreementError, match=r"differ by up to 0\.5"):
        contest([FakeSide("a", 0.001, []), FakeSide("b", 0.001, [], score=0.5)], grid, rounds=1, seconds=0.1)


def test_a_contest_with_nan_scores_is_refused() -> None:
    with pytest.raises(DisagreementError):
        contest([FakeSide("a", 0.001, [], score=float("nan"))], grid, rounds=1, seconds=0.1)


def test_ratios_are_taken_round_by_round() -> None:
    class Changing(FakeSide):
        def score(self, grid: Grid) -> tuple[float, NDArray[np.float32]]:
            seconds, scores = super().score(grid)
            return seconds * next(pace), scores

    pace = iter([1, 1, 2, 4])  # the first one is for the warm-up round
    found = contest([FakeSide("steady", 1.0, []), Changing("changing", 1.0, [])], grid, rounds=3, seconds=1.0)
    ratio = found.ratio("steady", "changing")
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1, 2, 4))


@pytest.mark.parametrize(
    ("value", "target", "higher_is_better", "reached"),
    [(0.97, 0.97, True, True), (0.96, 0.97, True, False), (0.2, 0.2, False, True), (0.3, 0.2, False, False)],
)
def test_a_figure_reaches_its_target_or_not(value: float, target: float, higher_is_better: bool, reached: bool) -> None:
    assert Figure("f", Spread(value, 0, 1), "x", target, higher_is_better).reached is reached


def test_results_are_written_drawn_and_shown(tmp_path: Path) -> None:
    figures = [
        Figure("speed", Spread(1.2, 1.1, 1.4), "x", 1.05),
        Figure("bytes", Spread(6.0, 6.0, 6.0), "bytes/pair", 8, False),
        Figure("rate", Spread(2000.0, 1900.0, 2100.0), "pairs/s"),
        Figure("growth", Spread(-2.0, -3.0, 1.0), "MiB", 64, False),
    ]
    report.write(tmp_path / "service.json", figures)
    records = json.loads((tmp_path / "service.json").read_text())
    assert records[0] == {
        "figure": "speed",
        "value": 1.2,
        "low": 1.1,
        "high": 1.4,
        "target": 1.05,
        "unit": "x",
        "higher_is_better": True,
    }
    assert [record["target"] for record in records] == [1.05, 8, None, 64]
    report.draw(tmp_path / "service.png", figures)
    assert (tmp_path / "service.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table(figures))
    shown = console.export_text().splitlines()
    assert next(line.split() for line in shown if "speed" in line) == [
        "speed",
        "1.2",
        "1.1",
        "1.4",
        "≥",
        "1.05",
        "yes",
        "x",
    ]
    assert next(line.split() for line in shown if "rate" in line) == ["rate", "2,000", "1,900", "2,100", "pairs/s"]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(600)


def test_grids_hold_different_real_texts(corpus: Corpus) -> None:
    first, second = corpus.grid(4, 16), corpus.grid(4, 16)
    assert first.pairs == 64
    for kind in ("queries", "documents"):
        texts = (*getattr(first, kind), *getattr(second, kind))
        assert len(set(texts)) == len(texts)
    with pytest.raises(ValueError, match="different texts were requested"):
        corpus.grid(1, 1_000_000)


def test_sized_texts_differ_and_have_their_size(corpus: Corpus) -> None:
    texts = corpus.sized(50, 1000)
    assert len(set(texts)) == 50
    assert {len(text.encode()) for text in texts} == {1000}


def test_an_ideal_prefix_cache_shares_whole_blocks() -> None:
    cache = IdealPrefixCache(4)
    assert cache.take(tuple(range(10))) == 0
    assert cache.take(tuple(range(10))) == 8
    assert cache.take((*range(7), 99, 98)) == 4
    assert cache.take(tuple(range(8))) == 4, "the last token is always computed"


def test_the_proxy_forwards_and_counts_every_byte() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                received = b""
                while data := connection.recv(1 << 16):
                    received += data
                connection.sendall(received[:1000])

        thread = threading.Thread(target=answer)
        thread.start()
        host, port = server.getsockname()
        with CountingProxy(f"{host}:{port}") as proxy:
            with socket.create_connection(proxy.address.rsplit(":", 1)) as client:
                client.sendall(b"x" * 200_000)
                client.shutdown(socket.SHUT_WR)
                received = b""
                while data := client.recv(1 << 16):
                    received += data
            assert received == b"x" * 1000
            assert proxy.bytes == 201_000
        thread.join(10)


_FAMILY = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('child', flush=True); import signal; signal.pause()"])
print("started", child.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Child]:
    with child([sys.executable, "-c", _FAMILY], tmp_path / "log") as process:
        process.wait_for("started", 30)
        process.wait_for("child", 30)
        yield process


def test_pause_and_resume_signal_the_whole_process_group(family: Child) -> None:
    (member,) = psutil.Process(family.pid).children()
    assert os.getpgid(member.pid) == family.pid
    family.pause()
    assert os.waitid(os.P_PID, family.pid, os.WSTOPPED).si_status == signal.SIGSTOP
    family.resume()
    assert os.waitid(os.P_PID, family.pid, os.WCONTINUED).si_status == signal.SIGCONT


def test_stopping_a_process_ends_its_children(family: Child) -> None:
    members = [psutil.Process(family.pid), *psutil.Process(family.pid).children()]
    family.pause()
    family.stop()
    _, alive = psutil.wait_procs(members, timeout=20)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def test_a_process_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(1)"]
    with child(command, tmp_path / "log") as process:
        with pytest.raises(ProcessError, match=r"ended before 'ready' was in its log(?s:.)*no such model"):
            process.wait_for("ready", 30)


def test_the_parts_cover_the_table() -> None:
    assert {"torch-minilm", "torch-tiny", "vllm-minilm", "vllm-tiny", "instant", "once", "causal"} < set(PARTS)


def test_a_slow_machine_measures_less_instead_of_taking_longer() -> None:
    every, last = list(PARTS), ["priority"]
    assert scale_for(every, 0) == 1
    assert scale_for(last, 100) == 1
    assert 0.4 < scale_for(every, 300) < 0.6
    assert 0.2 < scale_for(last, 570) < 0.3
    assert scale_for(last, 2000) == 0.1


@pytest.mark.usefixtures("forked_children")
def test_a_small_run_measures_and_writes(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.service.Corpus", lambda: corpus)  # to read all texts takes longer than the rest
    console = Console(quiet=True)
    figures = run(["torch-tiny"], output=tmp_path, rounds=2, scale=0.01, console=console)
    by_name = {figure.name: figure for figure in figures}
    bare = by_name["torch, tiny: stream / bare engine"]
    assert bare.target == 0.9
    assert 0 < bare.spread.low <= bare.spread.value <= bare.spread.high
    assert by_name["torch, tiny: stream"].spread.value > 1
    assert len(json.loads((tmp_path / "service.json").read_text())) == len(figures)
    assert (tmp_path / "service.png").stat().st_size > 0


def test_parts_on_a_gpu_are_skipped_with_a_word_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    on_gpu(["--part", "speed", "loss", "--output", str(tmp_path)])
    assert "Speed and loss skipped: this machine has no CUDA GPU" in capsys.readouterr().out


@pytest.mark.usefixtures("forked_children")
def test_the_benchmark_on_a_gpu_can_be_rehearsed(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = " ".join(corpus.texts()).split()
    monkeypatch.setattr("benchmarks.gpu.run.words", lambda: few)
    monkeypatch.setattr("benchmarks.gpu.formats.words", lambda: few)
    wanted = ["--shape", "ettin-17m", "--engine", "torch", "--part", "speed", "formats", "--dtype", "float32"]
    on_gpu(["--tiny", *wanted, "--output", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [record["side"].split()[0] for record in records] == ["CrossEncoder.predict", "torch", "stream,"]
    assert all(record["rehearsal"] and record["pairs_per_second"] > 0 for record in records)
    # All sides compute the same scores, raw scores of a standard deviation of 3.
    assert max(record["largest_difference"] for record in records) < 0.01
    errors = {line["side"]: line for line in map(json.loads, (tmp_path / "formats.jsonl").read_text().splitlines())}
    assert errors["torch engine float32"]["largest"] < 0.01
    assert errors["torch engine float32"]["flipped"]["0.05"] == 0
    assert errors["torch engine bfloat16"]["largest"] > errors["torch engine float16"]["largest"] > 0.001


@pytest.mark.parametrize("name", ["bert", "modernbert", "xlm-roberta", "qwen3"])
def test_operations_are_those_that_pytorch_counts(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModel

    shape = next(tiny(shape) for shape in SHAPES if shape.family == name)
    config: Any = AutoConfig.for_model(name, **shape.config, pad_token_id=0, attn_implementation="eager")
    model = AutoModel.from_config(config).eval()
    tokens = 100  # below the window of local attention
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.ones(2, tokens, dtype=torch.long))
    ours = operations(shape, np.array([tokens, tokens]))
    # A causal model's attention needs half of what is computed without a causal kernel; poolers are left out.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.15)
