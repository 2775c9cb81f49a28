"""Tools and calls of tools in a row, in the one shape that chat templates know: OpenAI's."""

from __future__ import annotations

import json
from typing import Any

from pipeline.data.rows import BadRow, kind, shorten, text

Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}
Call = dict[str, Any]  # {"type": "function", "function": {"name", "arguments": {...}}}, and maybe an "id"


def read_tools(value: Any, what: str) -> tuple[Tool, ...]:
    """Return the tools of a conversation: a list of objects, or the same as JSON text, with or without `function`.

    Raises:
        BadRow: if one of them has no name.
    """
    return tuple(
        {"type": "function", "function": _function(tool, f"tool {number} of {what}")}
        for number, tool in enumerate(_objects(value, what), start=1)
    )


def read_calls(value: Any, what: str) -> list[Call]:
    """Return the calls of a message: one object or a list of them, or the same as JSON text.

    Arguments become an object, because most templates write them as JSON; `""` stands for no arguments.

    Raises:
        BadRow: if one of them has no name, or has arguments that are no object.
    """
    calls = []
    for number, call in enumerate(_objects(value, what), start=1):
        told = f"call {number} of {what}"
        function = _function(call, told)
        arguments = _arguments(function.get("arguments"), told)
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | identity)
    return calls


def _objects(value: Any, what: str) -> list[dict]:
    value = _parsed(value, what)
    items = [_parsed(item, what) for item in (value if isinstance(value, list) else [value])]
    for item in items:
        if not isinstance(item, dict):
            raise BadRow(f"{what} has {kind(item)} {shorten(item)}; an object with a name is expected")
        try:
            json.dumps(item, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            raise BadRow(f"{what} has half a character, or is nested too deeply; remove it, or the row") from None
    return items


def _parsed(value: Any, what: str) -> Any:
    """Return the value, read as JSON if it is text; some files have JSON in JSON."""
    try:
        while isinstance(value, str):
            value = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} is not valid JSON: {shorten(value)}") from None
    return value


def _refuse(constant: str) -> None:
    """Refuse NaN and infinity, which are no JSON."""
    raise ValueError(constant)


def _function(item: dict, what: str) -> dict:
    function = item["function"] if isinstance(item.get("function"), dict) else item
    if "name" not in function:
        raise BadRow(f"{what} has no name; found are {shorten(', '.join(item)) or 'no keys'}")
    text(function["name"], f"the name of {what}")
    return function


def _arguments(value: Any, what: str) -> dict:
    value = {} if value in (None, "") else _parsed(value, f"the arguments of {what}")
    if not isinstance(value, dict):
        raise BadRow(f"the arguments of {what} are {kind(value)} {shorten(value)}; an object is expected")
    return value
