"""Rows of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.rows import BadRow, shorten, without_nulls
from pipeline.data.table import Row, Table
from pipeline.errors import DataError, install

_BATCH = 1024  # rows in memory at once


def open_parquet(path: Path, name: str) -> Table:
    """Return a Parquet file as a table.

    Raises:
        DataError: if it is not one, or a package is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{name}: reading Parquet needs a package; run: {install('pyarrow')}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _no_parquet(name, error) from None
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{name}: the column {shorten(twice)!r} stands twice; keep one")

    def read(wanted: Sequence[str]) -> Iterator[Row]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                used = [column for column in columns if column in wanted]
                for batch in file.iter_batches(_BATCH, columns=used or None):
                    for row in _plain(batch):
                        number += 1
                        yield f"row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _no_parquet(f"{name}, after row {number}", error) from None

    return Table(name, columns, read)


def _plain(batch: Any) -> Iterator[Any]:
    """Yield a batch's rows as Python values, without the keys that Arrow filled in."""
    try:
        for row in batch.to_pylist():
            yield {column: without_nulls(value) for column, value in row.items()}
    except UnicodeDecodeError:  # text that is no UTF-8, which Arrow does not look at
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield BadRow("not UTF-8; write the file anew from text")


def _no_parquet(name: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or shorten(str(error), 120)
    return DataError(f"{name}: not a Parquet file, or a damaged one ({reason}); write it anew, or name another")
