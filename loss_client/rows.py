"""Rows: reads JSON lines, CSV, TSV and Parquet files, and directories that ``datasets`` saved, one row at a time."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Values of a row by column."""

_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = {".csv": ",", ".tsv": "\t"}
_PARQUET = ".parquet"
_BATCH_ROWS = 1024


class RowsError(ValueError):
    """A file cannot be read, or a row has another form than expected; the message names both."""


class Rows:
    """Rows of a file or directory. Memory does not grow with their number.

    Args:
        path: The file or directory. The name's ending decides: ``.jsonl``, ``.ndjson`` or ``.json`` (an object on each
            line), ``.csv``, ``.tsv`` (names of columns in the first line), ``.parquet``; a directory is read with
            ``datasets.load_from_disk``. The last two need the package datasets.

    Raises:
        RowsError: There is no such file, or its name has another ending.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise RowsError(f"{path} does not exist")
        endings = (*_LINES, *_TABLES, _PARQUET)
        if not path.is_dir() and path.suffix.lower() not in endings:
            raise RowsError(f"{path}: the name has to end with one of {', '.join(endings)}, or be a directory")
        self.path = path

    def count(self) -> int | None:
        """Return the number of rows; ``None`` for a CSV or TSV file, which has to be parsed to count its rows."""
        ending = self.path.suffix.lower()
        if self.path.is_dir():
            return len(_load(self.path))
        if ending == _PARQUET:
            return int(_parquet(self.path).metadata.num_rows)
        if ending in _TABLES:
            return None
        with self.path.open("rb") as file:
            return sum(1 for line in file if line.strip())

    def read(self, skip: int = 0) -> Iterator[Row]:
        """Yield the rows, without the first ``skip`` ones.

        Raises:
            RowsError: The file cannot be read, or a line is no JSON object.
        """
        ending = self.path.suffix.lower()
        if self.path.is_dir():
            found = _load(self.path)
            return iter(found.select(range(min(skip, len(found)), len(found))))
        if ending == _PARQUET:
            batches = _parquet(self.path).iter_batches(_BATCH_ROWS)
            return islice((row for batch in batches for row in batch.to_pylist()), skip, None)
        if ending in _TABLES:
            return islice(self._table(_TABLES[ending]), skip, None)
        return self._lines(skip)

    def _lines(self, skip: int) -> Iterator[Row]:
        try:
            with self.path.open(encoding="utf-8") as file:
                for number, line in enumerate(line for line in file if line.strip()):
                    if number < skip:
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise RowsError(f"{self.path}, row {number + 1} is no JSON: {error}") from None
                    if not isinstance(row, dict):
                        raise RowsError(f"{self.path}, row {number + 1} is no JSON object")
                    yield row
        except (OSError, UnicodeDecodeError) as error:
            raise RowsError(f"{self.path} cannot be read as UTF-8 text: {error}") from None

    def _table(self, delimiter: str) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)  # the default refuses texts of 128 KiB
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file, delimiter=delimiter)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RowsError(f"{self.path} cannot be read as a table: {error}") from None


def _load(path: Path) -> Any:
    datasets = _module("datasets", path)
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise RowsError(f"{path} was not saved by datasets: {error}") from None
    if not isinstance(found, datasets.Dataset):
        raise RowsError(f"{path} holds several data sets: {', '.join(found)}; give the directory of one of them")
    return found


def _parquet(path: Path) -> Any:
    module = _module("pyarrow.parquet", path)
    try:
        return module.ParquetFile(str(path))
    except (OSError, ValueError) as error:
        raise RowsError(f"{path} is no Parquet file: {error}") from None


def _module(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RowsError(f"{path} needs the package datasets: pip install 'reranker-grpc[train]'") from None
