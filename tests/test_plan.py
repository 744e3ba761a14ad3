"""Tests of the command ``plan``: its arithmetic, its measurement of real servers, its report and its errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proxy import CountingProxy
from chaos import model
from chaos.servers import Server
from loss_client import RerankerClient
from loss_client.__main__ import main
from loss_client.client.chunks import grid_chunks, list_chunks
from loss_client.plan import wire
from loss_client.plan.advice import advise
from loss_client.plan.arithmetic import TOP_P_SHARES, Plan, Speed
from loss_client.plan.batch import Batch
from loss_client.plan.report import three
from loss_client.plan.texts import RandomWords, read_rows
from loss_client.plan.wire import Texts, wire_bytes

from .servers import ServerProcess
from .test_packaging import modules_after

DOCS = Path(__file__).parent.parent / "docs"
RATE = 2000
ISSUE = Plan(Batch(1024, 2), 0.5, Speed(3000), servers=1, texts=Texts(60, 600), steps=720)
"""Batch of 1,024, half a second a step, 3,000 pairs/s; an hour has 7,200 such steps, an epoch six minutes."""
ARGUMENTS = ("plan", "--batch", "1024", "--columns", "2", "--step-seconds", "0.5")


@pytest.fixture(scope="module")
def model_of_numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.build(tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture(scope="module")
def fixed_rate(model_of_numbers: Path) -> Iterator[Server]:
    """A real server whose engine scores ``RATE`` pairs a second."""
    with Server(model_of_numbers, model_of_numbers.parent, RATE) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def instant(model_of_numbers: Path) -> Iterator[ServerProcess]:
    """A real server whose engine answers at once."""
    with ServerProcess("--model", str(model_of_numbers), "--engine", "torch", module="benchmarks.instant") as server:
        yield server


def step(plan: Plan, mode: str) -> float:
    return plan.cost(getattr(plan, mode)()).step_seconds


def test_pairs_of_a_batch() -> None:
    assert Batch(1024, 2).pairs == 1024**2
    assert Batch(1024, 5).pairs == 1024 * 4096
    assert Batch(1024, 5).own == 4096
    assert ISSUE.nearest(16).pairs == 1024 * 17
    assert ISSUE.nearest(0.5).pairs == 1024 + 512
    assert ISSUE.nearest(2000).pairs == 1024**2, "there are no more pairs than all"


def test_pairs_of_several_ranks() -> None:
    apart, gathered = Batch(256, 3, ranks=4), Batch(256, 3, ranks=4, gather=True)
    assert apart.pairs == 4 * 256 * 512
    assert gathered.pairs == 4 * apart.pairs == 1024 * 2048
    assert apart.own == gathered.own == 4 * 512


def test_a_step_takes_the_longer_one_of_training_and_scoring() -> None:
    everything = ISSUE.cost(ISSUE.all_pairs())
    assert everything.scoring_seconds == pytest.approx(1024**2 / 3000)
    assert everything.step_seconds == everything.scoring_seconds
    assert step(replace(ISSUE, servers=100), "all_pairs") == pytest.approx(1024**2 / 300_000)
    assert step(replace(ISSUE, servers=700), "all_pairs") == 0.5
    assert step(ISSUE, "own_documents") == 0.5


def test_servers_without_a_wait_are_the_fewest_that_score_in_the_time_of_a_step() -> None:
    for mode in (ISSUE.all_pairs(), ISSUE.nearest(16), ISSUE.own_documents()):
        needed = ISSUE.cost(mode).servers_without_wait
        assert replace(ISSUE, servers=needed).cost(mode).step_seconds == 0.5
        assert needed == 1 or replace(ISSUE, servers=needed - 1).cost(mode).step_seconds > 0.5
    exact = replace(ISSUE, speed=Speed(1024 * 17 / 0.5 / 7))
    assert exact.cost(exact.nearest(16)).servers_without_wait == 7


def test_the_pairs_that_are_known_late_add_to_the_step() -> None:
    for mode in ISSUE.top_p():
        cost = ISSUE.cost(mode)
        assert mode.ahead == 1024
        assert cost.step_seconds == pytest.approx(0.5 + mode.late / 3000)
        needed = cost.servers_without_wait
        assert replace(ISSUE, servers=needed).cost(mode).step_seconds <= 0.5 * 1.05 + 1e-9
        assert replace(ISSUE, servers=needed - 1).cost(mode).step_seconds > 0.5 * 1.05
    slow = replace(ISSUE, speed=Speed(1000))  # its own documents take longer than a step
    assert step(slow, "own_documents") == pytest.approx(1.024)
    (first, *_) = slow.top_p()
    assert slow.cost(first).step_seconds == pytest.approx(first.pairs / 1000)


def test_auto_scores_as_many_pairs_as_fit_into_a_step() -> None:
    auto = ISSUE.nearest_auto()
    assert auto.pairs == 1500
    assert auto.per_anchor == pytest.approx((1500 - 1024) / 1024)
    assert step(ISSUE, "nearest_auto") == 0.5
    assert replace(ISSUE, servers=10**6).nearest_auto().pairs == 1024**2
    assert replace(ISSUE, speed=Speed(1)).nearest_auto().pairs == 1024, "own documents are always scored"


def test_gpu_hours_are_servers_times_hours() -> None:
    assert ISSUE.cost(ISSUE.own_documents()).gpu_hours == pytest.approx(0.1)
    assert replace(ISSUE, servers=12).cost(ISSUE.nearest(16)).gpu_hours == pytest.approx(1.2)
    assert ISSUE.cost(ISSUE.nearest(16)).gpu_hours == pytest.approx(720 * 1024 * 17 / 3000 / 3600)
    assert replace(ISSUE, steps=None).cost(ISSUE.own_documents()).gpu_hours is None


def test_a_bi_encoder_takes_time_for_texts_and_not_for_pairs() -> None:
    plan = replace(ISSUE, speed=Speed(4096, by_text=True))
    costs = [plan.cost(mode) for mode in (plan.all_pairs(), plan.nearest(16), *plan.top_p())]
    assert {cost.scoring_seconds for cost in costs} == {0.5}
    assert {cost.step_seconds for cost in costs} == {0.5}
    assert plan.nearest_auto().pairs == 1024**2


def test_the_shares_of_top_p_are_those_of_the_page() -> None:
    page = (DOCS / "loss-performance.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| minilm")]
    shares = {float(row[2]): float(row[4]) for row in rows if len(row) == 8}  # T, before, after, two columns of rounds
    assert shares == TOP_P_SHARES
    larger = replace(ISSUE, batch=Batch(3000, 2))
    assert [mode.pairs for mode in larger.top_p()] == [round(3000**2 * share) for share in TOP_P_SHARES.values()]


@pytest.mark.parametrize(("chunk_pairs", "published"), [(1024, 6.3), (128, 6.99)])
def test_bytes_agree_with_those_that_were_measured_for_a_grid_of_a_million_pairs(
    chunk_pairs: int, published: float
) -> None:
    batch = Batch(1024, 2)
    of_pair = wire_bytes(batch, Texts(1000, 1000), batch.pairs, chunk_pairs, listed=False) / batch.pairs
    assert of_pair == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("rows", "chunk_pairs"), [(128, 128), (256, None)])
def test_bytes_agree_with_those_that_pass_a_proxy(
    instant: ServerProcess, listed: bool, rows: int, chunk_pairs: int | None
) -> None:
    source = RandomWords(10, 20)
    queries, documents = source.queries(rows), source.documents(rows)
    ids = np.divmod(np.arange(rows**2), rows)
    with CountingProxy(instant.address) as proxy, RerankerClient(proxy.address) as client:
        client.rerank("a query", ["a document"])
        before = proxy.bytes
        # As the loss asks for them.
        if listed:
            client.stream_pairs(queries, documents, *ids, chunk_pairs=chunk_pairs).result()
        else:
            client.stream_grid(queries, documents, chunk_pairs=chunk_pairs).result()
        passed = proxy.bytes - before
    expected = wire_bytes(Batch(rows, 2), source.sizes(), rows**2, chunk_pairs, listed)
    assert passed == pytest.approx(expected, rel=0.05)
    of_chunks_of_128 = wire_bytes(Batch(rows, 2), source.sizes(), rows**2, 128, listed)
    assert chunk_pairs or abs(passed - expected) < abs(passed - of_chunks_of_128)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("chunk_pairs", [128, 4096])
def test_the_bytes_of_equal_chunks_are_those_of_the_chunks_that_are_cut(listed: bool, chunk_pairs: int) -> None:
    rows, columns = 1000, 2000
    cut = list_chunks(rows * columns, chunk_pairs) if listed else grid_chunks(rows, columns, chunk_pairs)
    chunks = list(cut)
    ids = sum(
        2 * chunk.pairs if listed else chunk.row_end - chunk.row_begin + chunk.column_end - chunk.column_begin
        for chunk in chunks
    )
    found = wire.list_sizes if listed else wire.grid_sizes
    assert found(*((rows * columns,) if listed else (rows, columns)), chunk_pairs, chunk_pairs) == (len(chunks), ids)


def test_the_bytes_of_a_huge_batch_are_continuous_and_found_at_once() -> None:
    of_pair = [
        wire_bytes(Batch(rows, 2), Texts(0, 0), rows**2, None, listed=False) / rows**2 for rows in (11_580, 11_600)
    ]
    assert of_pair[1] == pytest.approx(of_pair[0], rel=0.01)
    wire_bytes(Batch(1 << 20, 9), Texts(0, 0), 8 << 40, None, listed=False)


def test_the_advice_takes_all_pairs_where_they_are_scored_in_time() -> None:
    fast = replace(ISSUE, speed=Speed(1e6), servers=3)
    assert advise(fast, ("all", "nearest"), 16).startswith('Take candidates="all" with 3 servers:')


def test_the_advice_takes_the_nearest_pairs_where_all_take_too_long() -> None:
    few, many = (advise(replace(ISSUE, servers=count), ("all", "nearest"), 16) for count in (1, 20))
    assert few.startswith('Take candidates="nearest" with per_anchor="auto" and 1 server: 0.465 pairs an anchor')
    assert "per_anchor=16 without a wait takes 12 servers" in few
    assert many.startswith('Take candidates="nearest" with per_anchor=16 and 12 servers:')
    slow = advise(replace(ISSUE, speed=Speed(1000)), ("all", "nearest"), 16)
    assert slow.startswith("Take 3 servers or more for candidates=")


def test_the_advice_for_a_bi_encoder_is_all_pairs_because_no_mode_takes_less_time() -> None:
    served = replace(ISSUE, speed=Speed(100, by_text=True))
    assert advise(served, ("all", "nearest"), 16).startswith('Take 41 servers for candidates="all":')
    assert advise(served, ("nearest",), 16).startswith("Take 41 servers or more for candidates=")


def test_the_advice_keeps_to_the_modes_that_are_compared() -> None:
    assert advise(ISSUE, ("all",), 16).startswith('Take 700 servers for candidates="all":')
    fast = replace(ISSUE, speed=Speed(1e7))
    assert advise(fast, ("nearest",), 16).startswith('Take candidates="nearest" with per_anchor=16 and 1 server:')


def test_the_speed_of_a_server_is_measured(fixed_rate: Server, capsys: pytest.CaptureFixture[str]) -> None:
    scored = fixed_rate.scored
    arguments = ("--address", fixed_rate.address, "--rows", "737280", "--seconds", "2", "--json")
    assert main([*ARGUMENTS, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["speed"]["unit"] == "pairs/s"
    assert 0.5 * RATE <= report["speed"]["rate"] <= 1.05 * RATE
    assert fixed_rate.scored - scored >= report["server"]["pairs"], "no cache answered"
    assert report["server"]["engine"] == "closed-form float32"
    assert report["server"]["kind"] == "cross-encoder"
    with RerankerClient(fixed_rate.address) as client:
        info = client.model_info()
    assert (report["server"]["model"], report["server"]["fingerprint"]) == (info.model, info.fingerprint)
    assert report["steps_per_epoch"] == 720
    everything = report["modes"][-1]
    assert everything["candidates"] == "all"
    assert everything["scoring_seconds"] == pytest.approx(1024**2 / report["speed"]["rate"])
    assert everything["gpu_hours"] == pytest.approx(720 * everything["step_seconds"] / 3600)


def test_a_bi_encoders_speed_is_in_texts(bi_encoder_server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--address", bi_encoder_server.address, "--seconds", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert " texts/s: " in printed
    assert "A bi-encoder embeds each text of a step once" in printed


def test_texts_of_a_training_set_give_columns_rows_and_lengths(
    fixed_rate: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": "four", "positive": "eight by", "negative": "ten bytes!", "label": 1}] * 5000
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = ("--texts", str(path), "--address", fixed_rate.address, "--seconds", "0.5", "--json")
    assert main(["plan", "--batch", "100", "--step-seconds", "1", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batch"]["columns"] == 3
    assert report["steps_per_epoch"] == 50
    assert report["texts"] == {"query_bytes": 4.0, "document_bytes": 9.0}


def test_a_directory_that_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"anchor": ["a", "b"], "positive": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    rows = read_rows(tmp_path / "saved")
    assert (rows.count, rows.columns, rows.sizes()) == (2, 2, Texts(1, 3))


def test_texts_differ_so_that_no_cache_answers(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"a": "same", "b": "other"}\n')
    for source in (RandomWords(1, 100), read_rows(tmp_path / "one.jsonl")):
        for texts in (source.queries(200), source.documents(200)):
            assert len(set(texts)) == 200
    assert {len(text.split()) for text in RandomWords(7, 100).documents(10)} == {100}
    assert {len(text.split()) for text in RandomWords(3, 100).queries(10)} == {3}


def test_the_report_has_the_modes_and_ends_with_the_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--pairs-per-second", "3000", "--steps-per-epoch", "720"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (everything,) = (line for line in lines if line.startswith("all "))
    assert everything.split() == ["all", "1,048,576", "350", "s", "350", "s", "700", "5.19", "MB", "69.9"]
    assert [line.split("  ")[0] for line in lines if "(estimate)" in line] == [
        f"nearest, top_p 0.999, T {temperature} (estimate)" for temperature in (0.01, 0.02, 0.05)
    ]
    assert lines[-1] == advise(ISSUE, ("all", "nearest"), 16)


def test_only_the_modes_that_are_asked_for_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--pairs-per-second", "3000", "--candidates", "nearest", "--per-anchor", "8", "--json")
    assert main([*ARGUMENTS, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [mode["pairs"] for mode in report["modes"]][:3] == [1024, 1500, 1024 * 9]
    assert report["server"] is None


def test_a_server_that_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loss_client.plan.command._ANSWER_SECONDS", 0.5)
    assert main([*ARGUMENTS, "--address", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1 could not be measured" in error
    assert "Connection refused" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--address", "nonsense"), "address 'nonsense' is not understood"),
        (("--pairs-per-second", "0"), "'0' has to be a number above 0"),
        (("--pairs-per-second", "inf"), "'inf' has to be a number above 0"),
        (("--pairs-per-second", "9", "--columns", "1"), "'1' has to be a whole number, 2 or more"),
        (("--pairs-per-second", "9", "--batch", "many"), "'many' has to be a whole number, 1 or more"),
        (("--pairs-per-second", "9", "--candidates", "some,all"), "'some': there is no such mode; right are all, "),
        (("--pairs-per-second", "9", "--address", "a:1"), "not allowed with argument"),
        ((), "one of the arguments --address --pairs-per-second is required"),
        (("--pairs-per-second", "9", "--texts", "absent.jsonl"), "absent.jsonl does not exist"),
        (("--pairs-per-second", "9", "--texts", "absent.jsonl", "--query-words", "3"), "leave out --query-words"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*ARGUMENTS, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("no json\n", "no json is no JSON object"),
        ('{"anchor": "a", "label": 1}\n', "has 1 columns of text; right are two or more"),
        ('["a", "b"]\n', "has 0 columns of text"),
        ('{"a": "a", "b": "b"}\n{"a": "a"}\n', "lacks a text in one of the columns a, b"),
    ],
)
def test_files_without_rows_of_text_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "rows.jsonl")


def test_the_command_imports_neither_torch_nor_sentence_transformers() -> None:
    command = ", ".join(map(repr, ("loss_client", *ARGUMENTS, "--pairs-per-second", "3000")))
    statement = (
        f"import contextlib, io, runpy; sys.argv = [{command}]\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('loss_client', run_name='__main__')"
    )
    loaded = modules_after(statement, {"reranker_service"})
    assert "loss_client" in loaded
    assert not loaded & {"torch", "sentence_transformers", "transformers", "datasets", "rich"}


RERANKERS = (
    ("MiniLM-L6", 38559),
    ("ettin-150m", 7568),
    ("bge-reranker-v2-m3", 4526),
    ("Qwen3-Reranker-0.6B (estimate)", 3000),
)
SECONDS_OF_TEXT = 0.73 / 512  # BERT-base's shape on one H100, batch 256 with two columns (docs/gpu.md)
ROWS = 1_000_000


def page_row(name: str, rate: int, rows: int, columns: int) -> str:
    train = SECONDS_OF_TEXT * rows * columns
    plan = Plan(Batch(rows, columns), train, Speed(rate), 1, Texts(60, 600), steps=math.ceil(ROWS / rows))
    everything, nearest = plan.cost(plan.all_pairs()), plan.cost(plan.nearest(16))
    top_p = plan.cost(plan.top_p()[1])
    extra = plan.nearest_auto().per_anchor
    cells = (
        name,
        f"{rows:,}",
        str(columns),
        three(train),
        *(three(cost.step_seconds) for cost in (everything, top_p, nearest)),
        f"{everything.servers_without_wait:,}",
        f"{nearest.servers_without_wait:,}",
        three(extra or 0.0),
        *(three(cost.gpu_hours or 0.0) for cost in (everything, nearest)),
    )
    return f"| {' | '.join(cells)} |"


def test_the_table_of_typical_set_ups_has_the_figures_of_the_command() -> None:
    rows = [
        page_row(name, rate, size, columns)
        for name, rate in RERANKERS
        for columns in (2, 5)
        for size in (256, 1024, 4096)
    ]
    page = (DOCS / "cost.md").read_text().splitlines()
    found = [line for line in page if line in rows]
    assert found == rows, "the rows of docs/cost.md should be:\n" + "\n".join(rows)


def test_the_report_of_the_page_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(
        r"```console\n\$ python -m loss_client (.*?)\n(.*?)```", (DOCS / "cost.md").read_text(), re.DOTALL
    )
    assert main(block[0].split()) == 0
    assert block[1] == capsys.readouterr().out


def test_top_p_alone_is_slower_than_the_nearest_pairs_in_every_row_of_the_table() -> None:
    for _, rate in RERANKERS:
        for rows in (256, 1024, 4096):
            plan = Plan(Batch(rows, 2), SECONDS_OF_TEXT * rows * 2, Speed(rate), 1, Texts(60, 600))
            assert plan.cost(plan.top_p()[1]).step_seconds > plan.cost(plan.nearest(16)).step_seconds


def test_the_speeds_of_the_table_are_those_that_were_measured() -> None:
    page = (DOCS / "gpu.md").read_text()
    for name, rate in RERANKERS[:3]:
        (line, *_) = (one for one in page.splitlines() if one.strip("| *").startswith(name))
        assert f"{rate:,}" in page[page.index(line) :]
    assert "| training alone (`CachedMultipleNegativesRankingLoss`) | 0.73 |" in page
