"""Rows of a JSON array, each with its number and its line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.packed import DAMAGED, PACKED, ending_of, open_bytes, unreadable
from pipeline.data.rows import BadRow, shorten
from pipeline.errors import DataError

LARGEST_BYTES = 1_000_000_000  # the whole text is in memory while its rows are read, with up to 4 bytes a character
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonRows:
    """A JSON decoder that refuses what Python's accepts or loses: NaN, and a key that stands twice."""

    def __init__(self):
        self._decoder = json.JSONDecoder(parse_constant=self._constant, object_pairs_hook=self._object)
        self._problem: BadRow | None = None

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """Return the value that begins at `start`, or a BadRow about it, and its end.

        Raises:
            ValueError, RecursionError: if the text is not JSON, or nested too deeply.
        """
        self._problem = None
        value, end = self._decoder.raw_decode(text, start)
        return self._problem or value, end

    def _constant(self, constant: str) -> None:
        self._problem = BadRow(f"{constant} is no JSON value; write null, or remove the row")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._problem = BadRow(f"the key {shorten(twice)!r} stands twice; keep one")
        return row


def read_array(path: str | os.PathLike, name: str, closing: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the items of the first array in a file, each with its number and its line.

    Args:
        path: a file whose first `[` opens the array.
        name: the file's name in errors.
        closing: the only text that may follow the array, or nothing.

    Raises:
        DataError: if the file is too large or cannot be read, or at the first item that is not JSON: the place
            where the next one begins is then unknown.
    """

    def error(where: str, problem: str) -> DataError:
        return DataError(f"{name}, {where}: not valid JSON: {problem}")

    text = _read(Path(path), name, ".data[]" if closing else ".[]")
    parser, number, line, counted = JsonRows(), 0, 1, 0
    at = _after_space(text, text.index("[") + 1)
    ended = text.startswith("]", at)
    at += ended
    while not ended:
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        where = f"row {number} (line {line})"
        try:
            value, at = parser.decode(text, at)
        except json.JSONDecodeError as problem:
            raise error(where, f"{problem.msg} at line {problem.lineno}") from None
        except RecursionError:
            raise error(where, "nested too deeply") from None
        except ValueError as problem:
            raise error(where, shorten(str(problem), 120)) from None
        yield where, value
        at = _after_space(text, at)
        if not text.startswith((",", "]"), at):
            raise error(where, "a comma or the end of the array is missing behind it")
        ended = text[at] == "]"
        at = _after_space(text, at + 1)
        if not ended and text.startswith("]", at):
            raise error(where, "a comma behind the last row; remove it")
    if text[at:].strip(" \t\n\r") != closing:
        raise error(f"line {1 + text.count(chr(10), 0, at)}", "something follows the rows; keep the rows alone")


def _read(path: Path, name: str, rows: str) -> str:
    """Return the text of a file; `rows` is the jq filter that turns it into JSON lines."""
    try:
        packed = ending_of(path).endswith(PACKED)
        with open_bytes(path) as file:
            content = file.read(1 + (LARGEST_BYTES if packed else min(LARGEST_BYTES, path.stat().st_size)))
    except DAMAGED as error:
        raise unreadable(name, error) from None
    if len(content) > LARGEST_BYTES:
        shown = f"zcat {name} | jq -c '{rows}'" if packed else f"jq -c '{rows}' {name}"
        limit = f"more than {LARGEST_BYTES / 1e9:g} GB"
        raise DataError(f"{name}: too large for a JSON array ({limit}). Try: {shown} > rows.jsonl")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError(f"{name}: not UTF-8 behind line {line}; save the file as UTF-8") from None


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "the pattern also matches no characters"
    return found.end()
