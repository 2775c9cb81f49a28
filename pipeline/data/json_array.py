"""The items of a JSON array, one after the other, without the whole text in memory."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.data.rows import BadRow, shorten
from pipeline.errors import DataError

_PIECE = 1 << 18  # bytes read at once, and more where one item is longer
_LONGEST_MARK = 16  # characters of an escape, a constant or a number's end that a piece may cut in two
_SPACE = " \t\n\r"


class JsonRows:
    """Python's JSON, less what is no JSON and what would be lost: NaN, and keys that stand twice."""

    def __init__(self):
        self._decoder = json.JSONDecoder(parse_constant=self._constant, object_pairs_hook=self._object)
        self._problem: BadRow | None = None

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, or the BadRow that it is, and where it ends.

        Raises:
            ValueError, RecursionError: if it is no JSON, or nested too deeply.
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
    """The items of the first array in a file, each with its number and its line.

    Args:
        path: a file whose first `[` opens the array.
        name: what errors call it.
        closing: what has to follow the array, and nothing else.

    Raises:
        DataError: if the file cannot be read, or at the first item that is no JSON: where the next one
            would begin cannot be known.
    """
    try:
        with open(path, "rb") as file:
            yield from _items(_Text(file, name), closing)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def _items(text: _Text, closing: str) -> Iterator[tuple[str, Any]]:
    text.skip_to("[")
    number = 0
    following = text.next_character()
    if following == "]":
        text.skip(1)
    while following != "]":
        number += 1
        where = f"row {number} (line {text.line})"
        yield where, text.value(where)
        following = text.next_character()
        if following not in (",", "]"):
            raise text.error(where, "a comma or the end of the array is missing behind it")
        text.skip(1)
        if following == "," and text.next_character() == "]":
            raise text.error(where, "a comma behind the last row; remove it")
    for expected in (*closing, ""):
        if text.next_character() != expected:
            raise text.error(f"line {text.line}", "something follows the rows; keep the rows alone")
        text.skip(len(expected))


class _Text:
    """The text of a file, of which only what is being looked at is in memory."""

    def __init__(self, file: BinaryIO, name: str):
        self.line = 1
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = JsonRows()
        self._text, self._at, self._ended = "", 0, False

    def error(self, where: str, problem: str) -> DataError:
        return DataError(f"{self._name}, {where}: not valid JSON: {problem}")

    def skip(self, characters: int) -> None:
        end = self._at + characters
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def skip_to(self, mark: str) -> None:
        """Go behind the next `mark`."""
        while (found := self._text.find(mark, self._at)) < 0 and not self._ended:
            self._more()
        self.skip(found + 1 - self._at)

    def next_character(self) -> str:
        """What comes after white space; nothing at the end of the file."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            self.skip(end - self._at)
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            self._more()

    def value(self, where: str) -> Any:
        """The JSON value that comes next, or the BadRow that it is."""
        while True:
            try:
                value, end = self._parser.decode(self._text, self._at)
                # A number may go on where it seems to end: 0 | .5
                margin = _LONGEST_MARK if isinstance(value, (int, float)) else 0
                if end + margin < len(self._text) or self._ended:
                    self.skip(end - self._at)
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_MARK
                if self._ended or not cut_off:
                    raise self.error(
                        where, f"{error.msg} at line {self.line + error.lineno - self._line_here}"
                    ) from None
            except RecursionError:
                raise self.error(where, "nested too deeply") from None
            except ValueError as error:
                raise self.error(where, shorten(str(error), 120)) from None
            self._more()

    @property
    def _line_here(self) -> int:
        """The line of this place within what is in memory, from 1."""
        return 1 + self._text.count("\n", 0, self._at)

    def _more(self) -> None:
        """Read another piece, as long as what is there already, so that a long item is not parsed often."""
        piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._ended = not piece
        try:
            added = self._decode.decode(piece, final=self._ended)
        except UnicodeDecodeError:
            raise DataError(f"{self._name}: not UTF-8 behind line {self.line}; save the file as UTF-8") from None
        self._text, self._at = self._text[self._at :] + added, 0
