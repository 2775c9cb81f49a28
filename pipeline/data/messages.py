"""Lists of messages in a row: `{role, content}`, and ShareGPT's `{from, value}` if its speakers are clear."""

from __future__ import annotations

from typing import Any

from pipeline.data.rows import BadRow, kind, shorten, text

ROLES = ("system", "user", "assistant", "tool")

# ShareGPT's speakers. Others ("bing", "observation", "function_call") may mean several things.
_SPEAKERS = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}

# Fields that change what a message means. Reading past them would train on something else.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")

Message = dict[str, str]


def messages(value: Any, column: str) -> list[Message]:
    """Return the messages in a row's column, as `{role, content}` and nothing else.

    Raises:
        BadRow: if it is no list of messages, or one of them is not what it should be.
    """
    if not isinstance(value, list):
        raise BadRow(f"`{column}` is {kind(value)} {shorten(value)}; a list of messages is expected")
    if not value:
        raise BadRow(f"`{column}` is empty; add messages, or remove the row")
    return [_message(message, f"message {n} of `{column}`") for n, message in enumerate(value, start=1)]


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"{what} is {kind(message)} {shorten(message)}; {{role, content}} is expected")
    role_key, content_key = ("role", "content")
    if message.get("role") is None and "from" in message:  # Arrow fills keys that other rows have with nulls
        role_key, content_key = ("from", "value")
    for key in (role_key, content_key):
        if key not in message:
            raise BadRow(f"{what} has no `{key}`; found are {shorten(', '.join(message)) or 'no keys'}")
    role = _role(message[role_key], role_key, what)
    for key in _UNSUPPORTED:
        if message.get(key):
            raise BadRow(f"{what} has `{key}`, which is not supported; remove it, or the row")
    content = message[content_key]
    if role == "tool" and content == "":  # a tool may well answer nothing
        return {"role": role, "content": content}
    return {"role": role, "content": text(content, f"the content of {what}")}


def _role(value: Any, key: str, what: str) -> str:
    if key == "role":
        if value in ROLES:
            return value
        raise BadRow(f"{what} has the role {shorten(value)}; allowed are {', '.join(ROLES)}")
    if isinstance(value, str) and value in _SPEAKERS:
        return _SPEAKERS[value]
    raise BadRow(f"{what} is from {shorten(value)}; allowed are {', '.join(_SPEAKERS)}")
