"""A row that cannot be used, and the way values are shown in its error."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import redact


class BadRow(Exception):
    """A row that nothing can be learned from.

    `str(error)` is one line with the reason and what to do. The reader of the source adds the place of the row, and
    decides whether to refuse the data set or to skip the row.
    """

    def __init__(self, reason: str):
        super().__init__(" ".join(reason.split()))


def columns_of(row: Any) -> dict:
    """Return `row` if it has columns.

    Raises:
        BadRow: if it is a number, a list, or another thing that JSON may hold.
    """
    if not isinstance(row, dict):
        raise BadRow(f"{kind(row)} {shorten(row)} where an object such as {{...}} is expected")
    return row


def is_empty(value: Any) -> bool:
    """Return True if a value says nothing: null, an empty text, list or object."""
    return value is None or value in ("", [], {}, ())


def without_nulls(value: Any) -> Any:
    """Return a value of an Arrow table without the keys of its objects that are null.

    Arrow gives all objects of a column the same keys. So a null may stand for a key that the file does not have.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def text(value: Any, what: str) -> str:
    """Return `value` if it is text that says something.

    Raises:
        BadRow: if it is no text, empty, or not to be written in UTF-8; it calls the value `what`.
    """
    if not isinstance(value, str):
        raise BadRow(f"{what} is {kind(value)} {shorten(value)}; text in quotes is expected")
    if not value.strip():
        raise BadRow(f"{what} is empty; write something, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"{what} has half a character ({broken}) at {error.start}; write it whole") from None
    return value


def kind(value: Any) -> str:
    """Return the kind of a value in a person's words and JSON's."""
    names = {bool: "the value", int: "the number", float: "the number", str: "the text", list: "the list"}
    return names.get(type(value), "the object" if isinstance(value, dict) else "the value")


def shorten(value: Any, longest: int = 60) -> str:
    """Return a value for a message: harmless to print, at most `longest` characters, as JSON unless it is prose."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    shown = redact(shown)[: longest + 1]
    shown = "".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in shown)
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."
