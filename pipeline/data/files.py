"""Rows of files: JSON lines, JSON, CSV, TSV and Parquet, by the ending of the name alone.

A reader yields rows one by one, each with its place: the line in a file of JSON lines; otherwise the row, counted from
the first row of data, with its line if there are lines. A row that cannot be read comes as a `BadRow`. What makes the
rest of the file unreadable is a `DataError`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.json_array import JsonRows, read_array
from pipeline.data.rows import BadRow, shorten, without_nulls
from pipeline.errors import DataError, install

Row = tuple[str, Any]  # ("line 3" or "row 3", what the row holds, or the BadRow that it is)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = 1 << 30  # characters; the csv module stops at 131072 unless told
_BATCH = 1024  # rows of a Parquet file in memory at once
_HEAD = 1 << 16  # bytes of a .json file that tell what kind it is
_JSON_KINDS = 'a .json file holds an array of objects, {"data": [...]} with such an array, or one JSON object a line'


@dataclass(frozen=True)
class Table:
    """A source of rows whose beginning can be read.

    Attributes:
        name: what errors call it.
        columns: the columns of all rows; None where every row says its own.
        read: the rows from the first; given names, other columns may be left out.
    """

    name: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Iterator[Row]]


def open_file(path: Path, name: str) -> Table:
    """Return a data file as a table.

    Args:
        path: a file with one of the endings in `ENDINGS`.
        name: what errors call it.

    Raises:
        DataError: if it cannot be read, or is not what its ending says.
    """
    try:
        return _OPENERS[path.suffix.lower()](path, name)
    except OSError as error:
        raise _unreadable(name, error) from None


def read_lines(path: str | os.PathLike, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, in UTF-8 with or without a byte order mark; ignore blank lines.

    Raises:
        DataError: if the file cannot be read.
    """
    parser = JsonRows()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    yield f"line {number}", _parse(line, parser)
    except OSError as error:
        raise _unreadable(name or str(path), error) from None


def _parse(line: bytes, parser: JsonRows) -> Any:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
    if text.startswith("["):
        return BadRow("a list where one JSON object a line is expected; write every item on its own line")
    try:
        value, end = parser.decode(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON at column {error.colno}: {error.msg}; write one whole object a line")
    except RecursionError:
        return BadRow("nested too deeply; a row holds messages, or a prompt and a completion")
    except ValueError as error:
        return BadRow(shorten(str(error), 120))
    return value


def _open_lines(path: Path, name: str) -> Table:
    return Table(name, None, lambda _: read_lines(path, name))


def _open_json(path: Path, name: str) -> Table:
    """Return an array, an object with an array under `data`, or JSON lines; the first characters tell."""
    with open(path, "rb") as file:
        head = file.read(_HEAD).removeprefix(_BYTE_ORDER_MARK).lstrip()
    opening = re.match(rb'\[|\{\s*"data"\s*:\s*\[', head)
    if opening:
        inside = "" if opening[0] == b"[" else "}"
        return Table(name, None, lambda _: read_array(path, name, closing=inside))
    return Table(name, None, lambda _: _lines_of_json(path, name))


def _lines_of_json(path: Path, name: str) -> Iterator[Row]:
    for number, (where, row) in enumerate(read_lines(path, name)):
        if number == 0 and isinstance(row, BadRow):
            raise DataError(f"{name}, {where}: {row}; {_JSON_KINDS}")
        if number == 0 and isinstance(row, dict) and _holds_columns(row):
            raise DataError(f"{name}, {where}: columns, not rows; {_JSON_KINDS} (pandas: to_json(orient='records'))")
        yield where, row


def _holds_columns(row: dict) -> bool:
    """Return True for `{"prompt": ["a", "b"], "completion": ["c", "d"]}`, or objects for lists, as pandas writes."""
    return bool(row) and all(
        isinstance(value, dict) or (isinstance(value, list) and value and not isinstance(value[0], dict))
        for value in row.values()
    )


def _open_separated(path: Path, name: str, delimiter: str) -> Table:
    """Return a table of a header and rows of cells; quoted cells may hold anything, with quotes doubled."""
    header = next(_cells(path, name, delimiter), (0, []))[1]
    if isinstance(header, BadRow):
        raise DataError(f"{name}, header: {header}")
    _check_header(header, name, delimiter)
    return Table(name, tuple(header), lambda _: _separated(path, name, delimiter, header))


def _check_header(header: list[str], name: str, delimiter: str) -> None:
    if not header:
        raise DataError(f"{name}: has no rows; write a line with the columns' names, and rows below it")
    called = "tabs" if delimiter == "\t" else "commas"
    for number, column in enumerate(header, start=1):
        if column != column.strip() or not column:
            raise DataError(
                f"{name}, header: column {number} is called {column!r}; the first line holds the columns' names, "
                f"with {called} between them and no white space around them"
            )
        if header.count(column) > 1:
            raise DataError(f"{name}, header: the column {shorten(column)!r} stands twice; keep one")
    if len(header) == 1 and re.search(r"[,;\t|]", header[0]):
        raise DataError(f"{name}, header: {header[0]!r} is one column; a file of this ending has {called} between them")


def _separated(path: Path, name: str, delimiter: str, header: list[str]) -> Iterator[Row]:
    rows = _cells(path, name, delimiter)
    next(rows)
    for number, (line, cells) in enumerate(rows, start=1):
        row: dict[str, str] | BadRow
        if isinstance(cells, BadRow):
            row = cells
        elif len(cells) == len(header):
            row = dict(zip(header, cells, strict=True))
        else:
            mark = "tab" if delimiter == "\t" else "comma"
            row = BadRow(f"{len(cells)} cell(s) for {len(header)} columns; put a cell with a {mark} in it in quotes")
        yield f"row {number} (line {line})", row


def _cells(path: Path, name: str, delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    """Yield the line on which each row begins, and its cells, without empty rows."""
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                line = rows.line_num + 1
                cells: list[str] | BadRow
                try:
                    cells = next(rows)
                    "".join(cells).encode("utf-8")
                except StopIteration:
                    return
                except UnicodeEncodeError:
                    cells = BadRow("not UTF-8; save the file as UTF-8")
                except csv.Error as error:
                    if "unexpected end" in str(error):
                        raise DataError(f"{name}, line {line}: the quotes that open here are never closed") from None
                    cells = BadRow(f"{error}; a cell in quotes has quotes around all of it, and twice inside")
                if cells:
                    yield line, cells
    except OSError as error:
        raise _unreadable(name, error) from None


def _open_parquet(path: Path, name: str) -> Table:
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


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name}: cannot be read: {error.strerror or error}")


_OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": _open_lines,
    ".ndjson": _open_lines,
    ".json": _open_json,
    ".csv": lambda path, name: _open_separated(path, name, ","),
    ".tsv": lambda path, name: _open_separated(path, name, "\t"),
    ".parquet": _open_parquet,
}
ENDINGS = tuple(_OPENERS)
