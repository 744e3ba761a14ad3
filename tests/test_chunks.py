"""Chunks: every pair once, few texts in a chunk, rows complete in order, panels that fit one stream."""

from __future__ import annotations

import numpy as np
import pytest

from loss_client.client.chunks import Chunk, grid_chunks, list_chunks, panel_shape
from loss_client.client.texts import TextTable, distinct

GRIDS = [(1, 1), (1, 1000), (1000, 1), (7, 5), (64, 64), (33, 129), (256, 1024), (3, 8)]
PAIRS = [1, 2, 3, 8, 50, 128, 1024, 5000]


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_a_grid_is_covered_once_by_chunks_within_the_limit(rows: int, columns: int, pairs: int) -> None:
    covered = np.zeros((rows, columns), dtype=int)
    for chunk in grid_chunks(rows, columns, pairs):
        assert 1 <= chunk.pairs <= pairs
        covered[chunk.row_begin : chunk.row_end, chunk.column_begin : chunk.column_end] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize(("rows", "columns", "pairs"), [(1024, 1024, 128), (1024, 1024, 1024), (256, 300, 128)])
def test_chunks_name_few_texts_and_nearly_fill_their_limit(rows: int, columns: int, pairs: int) -> None:
    chunks = list(grid_chunks(rows, columns, pairs))
    named = sum(each.row_end - each.row_begin + each.column_end - each.column_begin for each in chunks)
    assert named / (rows * columns) < 0.3
    assert len(chunks) * pairs < 1.2 * rows * columns


@pytest.mark.parametrize("pairs", PAIRS)
def test_rows_are_complete_in_order_up_to_a_band(pairs: int) -> None:
    begins = [chunk.row_begin for chunk in grid_chunks(100, 100, pairs)]
    assert begins == sorted(begins)
    band = max(chunk.row_end - chunk.row_begin for chunk in grid_chunks(100, 100, pairs))
    assert band <= max(8, pairs // 100)


def test_panels_are_finished_one_after_another() -> None:
    chunks = list(grid_chunks(20, 30, 16, (10, 15)))
    panels = [(chunk.row_begin // 10, chunk.column_begin // 15) for chunk in chunks]
    assert list(dict.fromkeys(panels)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert panels == sorted(panels)
    assert sum(chunk.pairs for chunk in chunks) == 600


@pytest.mark.parametrize(("count", "pairs"), [(1, 1), (10, 3), (1024, 1024), (1025, 1024)])
def test_a_list_is_covered_in_order(count: int, pairs: int) -> None:
    chunks = list(list_chunks(count, pairs))
    positions = [position for chunk in chunks for position in range(chunk.row_begin, chunk.row_end)]
    assert positions == list(range(count))
    assert all(chunk.pairs <= pairs for chunk in chunks)


@pytest.mark.parametrize(("rows", "columns"), [*GRIDS, (1024, 1024), (200, 6000)])
@pytest.mark.parametrize("panel", [None, (100, 300)])
def test_chunks_that_may_grow_cover_a_grid_once_and_grow_with_it(
    rows: int, columns: int, panel: tuple[int, int] | None
) -> None:
    covered = np.zeros((rows, columns), dtype=np.int8)
    before = 0
    for chunk in grid_chunks(rows, columns, 128, panel, most=4096):
        covered[chunk.row_begin : chunk.row_end, chunk.column_begin : chunk.column_end] += 1
        # A band of rows is not cut finer at its end.
        after = rows * columns - before + 8 * columns
        assert 1 <= chunk.pairs <= max(128, min(4096, before // 32, after // 32))
        before += chunk.pairs
    assert (covered == 1).all()


def test_chunks_of_a_large_grid_are_small_at_its_ends_and_large_between() -> None:
    pairs = [chunk.pairs for chunk in grid_chunks(1024, 1024, 128, most=4096)]
    assert pairs[:32] == [128] * 32
    assert max(pairs[-32:]) <= 512
    assert max(pairs) == 4096
    assert len(pairs) < 500


@pytest.mark.parametrize("count", [1, 128, 10_000, 1_000_000])
def test_chunks_that_may_grow_cover_a_list_once_and_grow_with_it(count: int) -> None:
    chunks = list(list_chunks(count, 128, most=4096))
    assert [chunk.row_begin for chunk in chunks] == [0, *(chunk.row_end for chunk in chunks)][:-1]
    assert chunks[-1].row_end == count
    for chunk in chunks:
        share = min(chunk.row_begin, count - chunk.row_begin) // 32
        assert 1 <= chunk.pairs <= max(128, min(4096, share))


def test_halves_are_the_whole() -> None:
    assert Chunk(0, 3, 4, 9).halves() == (Chunk(0, 3, 4, 6), Chunk(0, 3, 6, 9))
    assert Chunk(0, 3, 4, 6).halves() == (Chunk(0, 1, 4, 6), Chunk(1, 3, 4, 6))
    assert Chunk(0, 1, 4, 6).halves() == (Chunk(0, 1, 4, 5), Chunk(0, 1, 5, 6))


@pytest.mark.parametrize(
    ("rows", "columns", "texts", "expected"),
    [
        (10, 20, 30, (10, 20)),  # the whole grid fits
        (10, 1000, 100, (10, 90)),  # all of the smaller side, a part of the other
        (1000, 10, 100, (90, 10)),
        (1000, 1000, 100, (50, 50)),
        (5, 5, 1, (1, 1)),
    ],
)
def test_panels_fit_the_texts_of_a_stream(rows: int, columns: int, texts: int, expected: tuple[int, int]) -> None:
    sizes = np.ones(max(rows, columns), dtype=np.int64)
    assert panel_shape(sizes[:rows], sizes[:columns], texts, 1 << 40) == expected


def test_panels_fit_the_bytes_of_a_stream() -> None:
    rows, columns = panel_shape(np.full(100, 10), np.full(400, 1000), 1 << 20, 101_000)
    assert (rows, columns) == (100, 100)


def test_equal_texts_are_one() -> None:
    table = TextTable()
    assert table.add(["b", "a", "b", ""], "queries").tolist() == [0, 1, 0, 2]
    assert table.add(["a", "é", "b"], "documents").tolist() == [1, 3, 0]
    assert table.texts == ["b", "a", "", "é"]
    assert table.sizes == [1, 1, 0, 2]


def test_distinct_keeps_the_order_of_appearance() -> None:
    values, positions = distinct(np.array([5, 2, 5, 9, 2]))
    assert values.tolist() == [5, 2, 9]
    assert positions is not None
    assert positions.tolist() == [0, 1, 0, 2, 1]
    values, positions = distinct(np.array([5, 2, 9]))
    assert values.tolist() == [5, 2, 9]
    assert positions is None


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a query", TypeError, "queries is a single str"),
        (["a", None], TypeError, r"queries\[1\] is not a string but NoneType"),
        (["a", ["b"]], TypeError, r"queries\[1\] is not a string but list"),
        (["a", "b\ud800"], ValueError, r"queries\[1\] cannot be written as UTF-8"),
    ],
)
def test_texts_that_cannot_be_sent_are_named(texts: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TextTable().add(texts, "queries")
