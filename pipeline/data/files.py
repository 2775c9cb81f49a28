"""Rows of files: JSON lines, JSON, CSV, TSV, text and Parquet, by the ending of the name alone.

A reader yields rows one by one, each with its place: the line in a file of JSON lines or text; otherwise the row,
counted from the first row of data, with its line if there are lines. A row that cannot be read comes as a `BadRow`.
What makes the rest of the file unreadable is a `DataError`. All but Parquet may be packed with gzip.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.json_array import JsonRows, read_array
from pipeline.data.packed import DAMAGED, PACKED, ending_of, open_bytes, unreadable
from pipeline.data.parquet_file import open_parquet
from pipeline.data.rows import BadRow, shorten
from pipeline.data.table import Row, Table
from pipeline.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = 1 << 30  # characters; the csv module stops at 131072 unless told
_HEAD = 1 << 16  # bytes of a .json file that tell what kind it is
_JSON_KINDS = 'a .json file holds an array of objects, {"data": [...]} with such an array, or one JSON object a line'


def open_file(path: Path, name: str) -> Table:
    """Return a data file as a table.

    Args:
        path: a file with one of the endings in `ENDINGS`.
        name: what errors call it.

    Raises:
        DataError: if it cannot be read, or is not what its ending says.
    """
    try:
        return _OPENERS[ending_of(path).removesuffix(PACKED)](path, name)
    except DAMAGED as error:
        raise unreadable(name, error) from None


def read_lines(path: str | os.PathLike, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, in UTF-8 with or without a byte order mark; ignore blank lines.

    Raises:
        DataError: if the file cannot be read.
    """
    parser = JsonRows()
    try:
        for number, line in _lines(path):
            if line.strip():
                yield f"line {number}", _parse(line, parser)
    except DAMAGED as error:
        raise unreadable(name or str(path), error) from None


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers, without a byte order mark."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


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
    with open_bytes(path) as file:
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
        with io.TextIOWrapper(open_bytes(path), "utf-8-sig", errors="surrogateescape", newline="") as file:
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
    except DAMAGED as error:
        raise unreadable(name, error) from None


def _open_text(path: Path, name: str) -> Table:
    """Return a table of texts: paragraphs between empty lines, or single lines if no line between texts is empty."""
    return Table(name, ("text",), lambda _: _texts(path, name))


def _has_paragraphs(path: Path) -> bool:
    """Return True if there is an empty line between two lines of text."""
    seen = gap = False
    for _, line in _lines(path):
        if line.strip():
            if gap:
                return True
            seen = True
        else:
            gap = seen
    return False


def _texts(path: Path, name: str) -> Iterator[Row]:
    first = 0
    lines: list[bytes] = []
    try:
        paragraphs = _has_paragraphs(path)
        for number, line in _lines(path):
            if line.strip():
                first = first if lines else number
                lines.append(line)
            if lines and not (paragraphs and line.strip()):
                yield _text_row(first, lines)
                lines = []
        if lines:
            yield _text_row(first, lines)
    except DAMAGED as error:
        raise unreadable(name, error) from None


def _text_row(number: int, lines: list[bytes]) -> Row:
    try:
        return f"line {number}", {"text": b"".join(lines).decode("utf-8").replace("\r\n", "\n").strip("\n")}
    except UnicodeDecodeError:
        return f"line {number}", BadRow("not UTF-8; save the file as UTF-8")


_OPENERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": _open_lines,
    ".ndjson": _open_lines,
    ".json": _open_json,
    ".csv": lambda path, name: _open_separated(path, name, ","),
    ".tsv": lambda path, name: _open_separated(path, name, "\t"),
    ".txt": _open_text,
    ".parquet": open_parquet,
}
ENDINGS = (*_OPENERS, *(ending + PACKED for ending in _OPENERS if ending != ".parquet"))
