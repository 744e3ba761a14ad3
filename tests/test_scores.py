"""ScoreMatrix: rows are readable by any thread as soon as they are complete, and failures reach every reader."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from loss_client.client.errors import JobCancelledError, RerankerError, RerankerTimeoutError, ScoreError
from loss_client.client.job import pair_list
from loss_client.client.scores import ScoreMatrix

WAIT_SECONDS = 20.0


def numbered(rows: int, columns: int) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


def test_rows_are_readable_as_soon_as_they_are_complete() -> None:
    reference = numbered(4, 6)
    matrix = ScoreMatrix((4, 6))
    matrix.put(slice(0, 2), slice(0, 3), reference[:2, :3])
    with pytest.raises(RerankerTimeoutError, match="rows 0 to 1 of the scores did not arrive"):
        matrix.rows(0, 1, timeout=0.01)
    matrix.put(slice(0, 2), slice(3, 6), reference[:2, 3:])
    np.testing.assert_array_equal(matrix.rows(0, 2), reference[:2])
    assert not matrix.done()
    with pytest.raises(RerankerTimeoutError):
        matrix.rows(1, 3, timeout=0.01)
    matrix.put([3, 2], slice(0, 6), reference[[3, 2]])
    assert matrix.done()
    np.testing.assert_array_equal(matrix.result(), reference)
    np.testing.assert_array_equal(np.asarray(matrix), reference)
    assert np.asarray(matrix, dtype=np.float64).dtype == np.float64
    assert matrix.rows(2, 2).shape == (0, 6)


def test_a_waiting_reader_wakes_for_its_rows_and_the_time_is_counted() -> None:
    matrix = ScoreMatrix((2, 2))
    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(matrix.rows, 0, 1, WAIT_SECONDS), pool.submit(matrix.rows, 1, 2, WAIT_SECONDS)
        matrix.put(slice(1, 2), slice(0, 2), numbered(1, 2))
        np.testing.assert_array_equal(second.result(WAIT_SECONDS), numbered(1, 2))
        assert not first.done()
        matrix.put(slice(0, 1), slice(0, 2), numbered(1, 2) + 5)
        np.testing.assert_array_equal(first.result(WAIT_SECONDS), numbered(1, 2) + 5)
    waited = matrix.wait_seconds
    matrix.result()
    assert matrix.wait_seconds == waited  # reading complete rows adds nothing


def test_waiting_is_measured() -> None:
    matrix = ScoreMatrix((1, 1))
    with pytest.raises(RerankerTimeoutError):
        matrix.rows(0, 1, timeout=0.05)
    assert 0.05 <= matrix.wait_seconds < 5


def test_rows_and_columns_may_share_stored_scores() -> None:
    row_ids, column_ids = np.array([0, 1, 0, 1]), np.array([2, 0, 1, 0, 2])
    stored = numbered(2, 3)
    matrix = ScoreMatrix((4, 5), row_ids=row_ids, column_ids=column_ids)
    matrix.put(slice(0, 1), slice(0, 3), stored[:1])
    np.testing.assert_array_equal(matrix.rows(2, 3), stored[[0]][:, column_ids])
    with pytest.raises(RerankerTimeoutError):
        matrix.rows(2, 4, timeout=0.01)
    matrix.put(slice(1, 2), slice(0, 3), stored[1:])
    np.testing.assert_array_equal(matrix.result(), stored[row_ids][:, column_ids])


def test_returned_arrays_are_copies() -> None:
    matrix = ScoreMatrix((2, 2))
    matrix.put(slice(0, 2), slice(0, 2), numbered(2, 2))
    matrix.rows(0, 2)[:] = -1
    np.testing.assert_array_equal(matrix.result(), numbered(2, 2))


def test_an_error_reaches_every_waiting_reader_and_complete_rows_stay_readable() -> None:
    matrix = ScoreMatrix((2, 2))
    matrix.put(slice(0, 1), slice(0, 2), numbered(1, 2))
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(matrix.result, WAIT_SECONDS) for _ in range(3)]
        assert matrix.fail(ScoreError("nonsense"))
        for each in waiting:
            with pytest.raises(ScoreError, match="nonsense"):
                each.result(WAIT_SECONDS)
    assert matrix.done()
    np.testing.assert_array_equal(matrix.rows(0, 1), numbered(1, 2))
    assert not matrix.fail(ScoreError("later"))
    matrix.put(slice(1, 2), slice(0, 2), numbered(1, 2))  # too late: dropped
    with pytest.raises(ScoreError, match="nonsense"):
        matrix.rows(1, 2)


def test_cancel_tells_the_job_once() -> None:
    calls: list[str] = []
    matrix = ScoreMatrix((1, 1), on_cancel=lambda: calls.append("cancelled"))
    matrix.cancel()
    matrix.cancel()
    assert calls == ["cancelled"]
    with pytest.raises(JobCancelledError):
        matrix.result()


def test_cancel_of_a_complete_matrix_does_nothing() -> None:
    calls: list[str] = []
    matrix = ScoreMatrix((1, 1), on_cancel=lambda: calls.append("cancelled"))
    matrix.put(slice(0, 1), slice(0, 1), numbered(1, 1))
    matrix.cancel()
    assert calls == []
    np.testing.assert_array_equal(matrix.result(), numbered(1, 1))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_matrix_is_complete(shape: tuple[int, int]) -> None:
    matrix = ScoreMatrix(shape)
    assert matrix.done()
    assert matrix.result().shape == shape


@pytest.mark.parametrize(("begin", "end"), [(-1, 1), (0, 3), (2, 1)])
def test_rows_that_do_not_exist(begin: int, end: int) -> None:
    with pytest.raises(IndexError, match="of a matrix with 2 rows"):
        ScoreMatrix((2, 2)).rows(begin, end)


def test_blocks_that_do_not_fit() -> None:
    matrix = ScoreMatrix((2, 2))
    with pytest.raises(ValueError, match="shape"):
        matrix.put(slice(0, 1), slice(0, 2), numbered(2, 2))
    matrix.put(slice(0, 2), slice(0, 1), numbered(2, 1))
    with pytest.raises(ValueError, match="arrived before"):
        matrix.put(slice(0, 2), slice(0, 2), numbered(2, 2))


def test_many_readers_and_writers() -> None:
    reference = numbered(64, 48)
    matrix = ScoreMatrix((64, 48))
    blocks = [(row, column) for row in range(0, 64, 4) for column in range(0, 48, 6)]
    order = np.random.default_rng(0).permutation(len(blocks))
    start = threading.Barrier(8)

    def write(part: int) -> None:
        start.wait(WAIT_SECONDS)
        for position in order[part::4]:
            row, column = blocks[position]
            block = reference[row : row + 4, column : column + 6]
            matrix.put(slice(row, row + 4), slice(column, column + 6), block)

    def read(part: int) -> bool:
        start.wait(WAIT_SECONDS)
        rows = range(part, 64, 4)
        return all(np.array_equal(matrix.rows(row, row + 1, WAIT_SECONDS)[0], reference[row]) for row in rows)

    with ThreadPoolExecutor(8) as pool:
        writers, readers = [pool.submit(write, i) for i in range(4)], [pool.submit(read, i) for i in range(4)]
        assert all(each.result(WAIT_SECONDS) for each in readers)
        for each in writers:
            each.result(WAIT_SECONDS)


def test_a_forked_child_does_not_wait_for_its_parents_job() -> None:
    matrix = ScoreMatrix((2, 1))
    matrix.put(slice(0, 1), slice(0, 1), numbered(1, 1))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        report: object = "nothing was raised"
        try:
            if matrix.rows(0, 1).shape == (1, 1):
                matrix.rows(1, 2, timeout=1.0)
        except BaseException as error:
            report = (type(error) is RerankerError, str(error))
        os.write(writing, pickle.dumps(report))
        os._exit(0)
    os.waitpid(child, 0)
    is_plain, message = pickle.loads(os.read(reading, 1 << 16))
    os.close(reading)
    os.close(writing)
    assert is_plain
    assert "forked" in message


def test_rows_are_readable_as_far_as_they_have_arrived() -> None:
    reference = numbered(3, 4)
    matrix = ScoreMatrix((3, 5), column_ids=np.array([3, 0, 1, 2, 0]))
    matrix.put(slice(0, 1), slice(0, 4), reference[:1])
    matrix.put(slice(1, 2), slice(1, 3), reference[1:2, 1:3])
    expected = np.full((3, 4), np.nan, np.float32)
    expected[0], expected[1, 1:3] = reference[0], reference[1, 1:3]
    found = matrix.arrived(0, 3, 0)
    np.testing.assert_array_equal(found, expected[:, [3, 0, 1, 2, 0]])
    matrix.cancel()
    np.testing.assert_array_equal(matrix.arrived(0, 3, WAIT_SECONDS), found)  # at once: the job has ended


def test_a_failed_job_is_not_one_that_is_late() -> None:
    matrix = ScoreMatrix((2, 1))
    matrix.put(slice(0, 1), slice(0, 1), numbered(1, 1))
    matrix.fail(RerankerTimeoutError("no finished work"))
    np.testing.assert_array_equal(matrix.arrived(0, 1, 0), numbered(1, 1))
    with pytest.raises(RerankerTimeoutError, match="no finished work"):
        matrix.arrived(0, 2, 0)


def test_the_span_ends_with_the_last_score() -> None:
    matrix = ScoreMatrix((2, 1))
    begun, running = matrix.span
    matrix.put(slice(0, 2), slice(0, 1), numbered(2, 1))
    ended = matrix.span[1]
    assert begun <= running <= ended == matrix.span[1]


def test_lower_bands_come_first_and_queries_are_grouped_within_a_band() -> None:
    # The pair of "b" and "y" is in both bands and belongs to the first.
    queries, documents = ["a", "b"], ["x", "y", "z"]
    query_ids, document_ids = [0, 1, 0, 1, 0, 1], [2, 0, 0, 1, 1, 1]
    pairs = pair_list(queries, documents, query_ids, document_ids, bands=[1, 0, 0, 0, 1, 1])
    texts = pairs.table.texts
    order = [texts[query] + texts[document] for query, document in zip(pairs.queries, pairs.documents, strict=True)]
    assert order == ["ax", "bx", "by", "az", "ay"]
    assert pairs.row_ids is not None
    asked = [queries[query] + documents[document] for query, document in zip(query_ids, document_ids, strict=True)]
    assert [order[row] for row in pairs.row_ids] == asked
    with pytest.raises(ValueError, match="2 bands for 6 pairs"):
        pair_list(queries, documents, query_ids, document_ids, bands=[0, 1])
