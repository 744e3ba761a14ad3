"""The command ``score``: rows of every format, stopped and continued runs, and promoted negatives."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from loss_client.__main__ import main
from loss_client.rows import Rows
from loss_client.score import scoring
from reranker.v1 import reranker_pb2 as pb

from .servers import ServerProcess
from .stub_server import Abort, ReceivedChunk, ReceivedStream, StubServer, hash_scores
from .test_packaging import SERVING, modules_after

Row = dict[str, Any]
PAIRS: list[Row] = [
    {"query": f"query {number // 3}", "document": f"document {number} ü", "id": number} for number in range(50)
]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server


def written(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(stub: StubServer, source: Path, output: Path, *flags: str) -> int:
    return main(["score", str(source), str(output), "--address", stub.target, *flags])


def expected(query: str, document: str) -> float:
    return float(str(hash_scores([query], [document])[0, 0]))


def scored_pairs(stub: StubServer) -> list[tuple[str, str]]:
    return [pair for stream in stub.streams for chunk in stream.chunks for pair in chunk.pairs()]


def test_pairs_get_a_score_each_in_their_order(stub: StubServer, tmp_path: Path) -> None:
    source, output = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "scored.jsonl"
    assert score(stub, source, output, "--batch-pairs", "7", "--in-flight", "3") == 0
    assert read(output) == [{**row, "score": expected(row["query"], row["document"])} for row in PAIRS]
    run = json.loads((tmp_path / "scored.jsonl.run.json").read_text())
    assert run["fingerprint"] == "stub"


def test_lists_of_documents_get_lists_of_scores(stub: StubServer, tmp_path: Path) -> None:
    rows = [
        {"question": "q", "texts": ["a", "b", "a"]},
        {"question": "r", "texts": []},
        {"question": "s", "texts": "c"},
    ]
    source, output = written(tmp_path / "lists.jsonl", rows), tmp_path / "scored.jsonl"
    flags = ("--query-column", "question", "--document-column", "texts", "--score-column", "teacher")
    assert score(stub, source, output, *flags) == 0
    a, b, c = expected("q", "a"), expected("q", "b"), expected("s", "c")
    assert [row["teacher"] for row in read(output)] == [[a, b, a], [], c]
    assert len(scored_pairs(stub)) == 3, "equal pairs are scored once"


def test_options_reach_the_server(stub: StubServer, tmp_path: Path) -> None:
    source = written(tmp_path / "pairs.jsonl", PAIRS[:1])
    flags = ("--score-type", "raw", "--instruction", "find", "--max-length", "99")
    assert score(stub, source, tmp_path / "scored.jsonl", *flags) == 0
    opened = stub.streams[0].open
    assert opened.priority == pb.PRIORITY_BULK
    assert (opened.options.score_type, opened.options.instruction, opened.options.max_length) == (
        pb.SCORE_TYPE_RAW,
        "find",
        99,
    )


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet", "directory"])
def test_every_format_is_read_the_same(form: str, stub: StubServer, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"query": "a\nb", "document": "c, d\t"}, {"query": "e", "document": "f"}, {"query": "g", "document": "h"}]
    source = tmp_path / (form if form == "directory" else f"rows.{form}")
    if form == "directory":
        Dataset.from_list(rows).save_to_disk(source)
    elif form == "parquet":
        Dataset.from_list(rows).to_parquet(source)
    else:
        with source.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if form == "csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    assert list(Rows(source).read(1)) == rows[1:]
    assert Rows(source).count() == (None if form in ("csv", "tsv") else 3)
    assert score(stub, source, tmp_path / "scored.jsonl") == 0
    assert [row["score"] for row in read(tmp_path / "scored.jsonl")] == [expected(*row.values()) for row in rows]


def test_a_stopped_run_goes_on_where_it_was(
    stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output, whole = (
        written(tmp_path / "pairs.jsonl", PAIRS),
        tmp_path / "scored.jsonl",
        tmp_path / "whole.jsonl",
    )
    assert score(stub, source, whole) == 0

    async def fail(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if PAIRS[30]["document"] in chunk.documents:
            raise Abort(grpc.StatusCode.INVALID_ARGUMENT, "not this one")

    stub.on_chunk = fail
    flags = ("--batch-pairs", "10", "--in-flight", "2")
    assert score(stub, source, output, *flags) == 1
    assert "stopped after 30 rows: INVALID_ARGUMENT: not this one" in capsys.readouterr().err
    assert len(read(output)) == 30
    with output.open("a") as file:
        file.write('{"query": "half a li')  # of a run that was killed while it wrote
    stub.on_chunk = None
    before = len(scored_pairs(stub))
    assert score(stub, source, output, *flags) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert len(scored_pairs(stub)) - before == 20, "rows that were written are not scored again"
    assert score(stub, source, output) == 0, "a finished run has nothing to do"
    assert output.read_bytes() == whole.read_bytes()


def test_an_interrupt_keeps_what_is_written(
    stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "scored.jsonl"
    send = scoring._send

    def interrupted(client: Any, batch: Any, *rest: Any) -> None:
        if batch.rows[0].row["id"] == 30:
            raise KeyboardInterrupt
        send(client, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_send", interrupted)
        assert score(stub, source, output, "--batch-pairs", "10", "--in-flight", "2") == 130
    assert "stopped after 20 rows; the same command goes on" in capsys.readouterr().err
    assert score(stub, source, output) == 0
    assert len(read(output)) == 50


def test_memory_is_bounded_by_the_batches_in_flight(stub: StubServer, tmp_path: Path) -> None:
    taken = 0

    class Output:
        fingerprint, written = None, 0

        def use(self, fingerprint: str | None) -> None:
            pass

        def write(self, rows: Iterator[Row]) -> None:
            self.written += len(list(rows))
            assert taken - self.written <= 3 * 4

    def asked(count: int) -> Iterator[Any]:
        nonlocal taken
        for taken in range(1, count + 1):
            yield columns.read({"query": "q", "document": f"{taken}"}, taken)

    from loss_client import RerankerClient
    from loss_client.score.pairs import PairColumns

    columns, output = PairColumns(), Output()
    with RerankerClient(stub.target) as client:
        scoring.score_rows(client, asked(100), columns, output, {}, batch_pairs=4, in_flight=3)  # type: ignore[arg-type]
    assert output.written == 100


def refused(stub: StubServer, capsys: pytest.CaptureFixture[str], source: Path, output: Path, *flags: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        score(stub, source, output, *flags)
    return capsys.readouterr().err


def test_a_file_never_has_scores_of_two_settings_or_models(
    stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "scored.jsonl"
    assert score(stub, source, output) == 0
    message = refused(stub, capsys, source, output, "--score-type", "raw")
    assert "was begun with score_type 'probability', not 'raw'" in message
    output.write_bytes(b"".join(output.read_bytes().splitlines(True)[:10]))
    stub.fingerprint = "other"
    assert score(stub, source, output) == 1
    assert "other" in capsys.readouterr().err
    assert len(read(output)) == 10
    assert score(stub, source, output, "--overwrite") == 0
    assert json.loads((tmp_path / "scored.jsonl.run.json").read_text())["fingerprint"] == "other"
    stranger = written(tmp_path / "mine.jsonl", PAIRS)
    assert "was not made by this command" in refused(stub, capsys, source, stranger)
    assert read(stranger) == PAIRS


def test_a_changed_input_is_noticed(stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = written(tmp_path / "pairs.jsonl", PAIRS[:10]), tmp_path / "scored.jsonl"
    assert score(stub, source, output) == 0
    written(source, PAIRS[1:])
    assert score(stub, source, output) == 1
    assert "has changed: its row 10 is not the one of the output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": "d"}, "row 1 has no column 'query'; it has 'document'"),
        ({"query": "q", "documents": ["a", 1]}, "row 1: column 'documents' has to hold a text or a list of texts"),
        ({"query": None, "document": "d"}, "row 1: column 'query' has to hold a text, not None"),
        ({"query": "q", "document": "d", "score": 1}, "row 1 has a column 'score' already"),
    ],
)
def test_a_wrong_row_is_named(
    row: Row, message: str, stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(stub, written(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl") == 1
    assert message in capsys.readouterr().err


def test_wrong_files_are_named(stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(stub, capsys, tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "a.txt").write_text("text")
    assert "has to end with one of .jsonl" in refused(stub, capsys, tmp_path / "a.txt", tmp_path / "out")
    (tmp_path / "a.jsonl").write_text("{]\n")
    assert score(stub, tmp_path / "a.jsonl", tmp_path / "out") == 1
    assert "a.jsonl, row 1 is no JSON" in capsys.readouterr().err


MINED: list[Row] = [
    # Scores in the texts: of the positive, then of each negative.
    {"anchor": "a", "positive": "p 50", "negative_1": "n 10", "negative_2": "n 61", "negative_3": "m 20", "more": 1},
    {"anchor": "b", "positive": "q 50", "negative_1": "o 95", "negative_2": "o 90", "negative_3": "o 80", "more": 2},
    {"anchor": "c", "positive": "r 50", "negative_1": "s 60", "negative_2": None, "negative_3": "r 50", "more": 3},
    {"anchor": "d", "positive": "t 50", "negative_1": "u 59", "negative_2": "u 58", "negative_3": "u 57", "more": 4},
]


def from_texts(queries: Sequence[str], documents: Sequence[str], options: pb.RerankOptions) -> Any:
    return np.array([[int(text.split()[1]) / 100 for text in documents] for _ in queries], dtype=np.float32)


@pytest.fixture
def promoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    from datasets import load_from_disk

    with StubServer(from_texts) as server:
        source = written(tmp_path / "mined.jsonl", MINED)
        assert score(server, source, tmp_path / "promoted", "--promote", "0.1001") == 0
    return load_from_disk(tmp_path / "promoted"), capsys.readouterr().out


def test_promoted_negatives_are_positives_and_no_negatives(promoted: tuple[Any, str], tmp_path: Path) -> None:
    dataset, printed = promoted
    assert dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    rows = [tuple(row.values()) for row in dataset]
    of_a = ("n 10", "m 20", "n 10")  # two are left, so the first is repeated
    assert rows[:2] == [("a", "p 50", *of_a), ("a", "n 61", *of_a)]
    of_b = [row for row in rows if row[0] == "b"]
    assert [row[1] for row in of_b] == ["q 50", "o 95", "o 90", "o 80"]
    for row in of_b:  # none is left: positives of the three other rows, all distinct
        assert set(row[2:]) == {"p 50", "r 50", "t 50"}
    # 0.6 is not above 0.5 by more than the margin; null and the positive's own text are no negatives.
    assert [row for row in rows if row[0] == "c"] == [("c", "r 50", "s 60", "s 60", "s 60")]
    assert rows[-1] == ("d", "t 50", "u 59", "u 58", "u 57")
    assert "8 rows from 4; 4 negatives of 2 rows became positives; negatives repeated in 3 rows, drawn" in printed
    assert "from other rows in 4; 0 rows left out" in printed
    kept = read(tmp_path / "promoted.scores.jsonl")
    assert kept[0]["scores"] == [0.5, 0.1, 0.61, 0.2]
    assert kept[2]["scores"] == [0.5, 0.6, 0.5], "null has no score"


def test_promoted_rows_train_the_librarys_own_losses(promoted: tuple[Any, str], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from .training import student

    model = student(tmp_path)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=promoted[0], loss=loss)
    assert trainer.train().training_loss > 0


def test_promotion_is_repeated_without_scoring_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shutil import rmtree

    from datasets import load_from_disk

    with StubServer(from_texts) as server:
        source, output = written(tmp_path / "mined.jsonl", MINED), tmp_path / "promoted"
        assert score(server, source, output, "--promote", "0.5") == 0
        assert len(load_from_disk(output)) == 4
        assert "exists: choose another name" in refused(server, capsys, source, output, "--promote", "0.05")
        rmtree(output)
        before = len(scored_pairs(server))
        assert score(server, source, output, "--promote", "0.05") == 0
        assert len(load_from_disk(output)) > 8
        assert len(scored_pairs(server)) == before
        assert "--negative-columns" in refused(
            server, capsys, written(tmp_path / "no.jsonl", PAIRS), tmp_path / "x", "--promote", "0"
        )


def test_scores_are_those_of_a_real_server(cross_encoder_server: ServerProcess, tmp_path: Path) -> None:
    from loss_client import RerankerClient

    source, output = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "scored.jsonl"
    address = cross_encoder_server.address
    assert main(["score", str(source), str(output), "--address", address, "--score-type", "raw"]) == 0
    with RerankerClient(address) as client:
        scores = client.score_pairs([(row["query"], row["document"]) for row in PAIRS], score_type="raw")
    np.testing.assert_allclose([row["score"] for row in read(output)], scores, atol=1e-4)


def test_lines_and_tables_need_the_client_alone(stub: StubServer, tmp_path: Path) -> None:
    source = written(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ["score", str(source), str(tmp_path / "out"), "--address", stub.target]
    statement = f"from loss_client.__main__ import main\nassert main({arguments!r}) == 0"
    modules_after(statement, SERVING | {"datasets", "torch", "pyarrow", "tqdm", "sentence_transformers"})
    assert len(read(tmp_path / "out")) == 50
