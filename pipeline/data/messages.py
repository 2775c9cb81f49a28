"""Lists of messages in a row: `{role, content}` as OpenAI has it, and `{from, value}` as ShareGPT has it.

A message becomes `{role, content}`. These keys are there only if they say something:

- `tool_calls` and `reasoning_content` of an answer;
- `name` and `tool_call_id` of what a tool answered;
- `weight`, which is 0, of an answer that is not to be learned.
"""

from __future__ import annotations

from typing import Any

from pipeline.data.rows import BadRow, is_empty, kind, shorten, text
from pipeline.data.tools import read_calls

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's new name for one, and its old name for another
# ShareGPT's speakers. Others (such as "bing") may mean several things.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ROLES},
}

_CALLS = ("tool_calls", "function_call")  # the second is OpenAI's old name, for one call
_REASONING = ("reasoning_content", "reasoning", "thinking")
_OF_TOOLS = ("name", "tool_call_id")
# Keys with which files say whether an answer is learned: those of OpenAI, axolotl and ms-swift.
_LEARNED = ("weight", "train", "training", "loss")
# Keys that change what a message means. Reading past them would train on something else.
_UNSUPPORTED = ("images", "image", "videos", "video", "audios", "audio", "refusal", "train_detail", "prefix")

Message = dict[str, Any]


def messages(value: Any, column: str, unread: set[str] | None = None) -> list[Message]:
    """Return the messages in a row's column.

    Args:
        unread: gets the keys with a value that is not read, as `column.key`.

    Raises:
        BadRow: if it is no list of messages, or one of them is not what it should be.
    """
    if not isinstance(value, list):
        raise BadRow(f"`{column}` is {kind(value)} {shorten(value)}; a list of messages is expected")
    if not value:
        raise BadRow(f"`{column}` is empty; add messages, or remove the row")
    found = [_message(message, f"message {n} of `{column}`") for n, message in enumerate(value, start=1)]
    if unread is not None:
        unread.update(f"{column}.{key}" for message in value for key in _unread(message))
    return found


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"{what} is {kind(message)} {shorten(message)}; {{role, content}} is expected")
    role_key, content_key = _keys(message)
    if role_key not in message:
        raise BadRow(f"{what} has no `{role_key}`; found are {shorten(', '.join(message)) or 'no keys'}")
    role = _role(message[role_key], role_key, what)
    for key in _UNSUPPORTED:
        if message.get(key):
            raise BadRow(f"{what} has `{key}`, and only text is learned; remove it, or the row")
    found: Message = {"role": role}
    if message[role_key] == "function_call":
        found["tool_calls"] = read_calls(message.get(content_key), what)
    elif calls := _first(message, _CALLS):
        _only_of_answers(calls, role, what)
        found["tool_calls"] = read_calls(message[calls], what)
    if "tool_calls" not in found and content_key not in message:
        raise BadRow(f"{what} has no `{content_key}`; found are {shorten(', '.join(message)) or 'no keys'}")
    found["content"] = _content(None if message[role_key] == "function_call" else message.get(content_key), found, what)
    if reasoning := _first(message, _REASONING):
        _only_of_answers(reasoning, role, what)
        found["reasoning_content"] = text(message[reasoning], f"`{reasoning}` of {what}")
    if role == "tool":
        found |= {key: message[key] for key in _OF_TOOLS if isinstance(message.get(key), str) and message[key]}
    if role == "assistant" and not _is_learned(message, what):
        found["weight"] = 0
    return found


def _keys(message: dict) -> tuple[str, str]:
    """Return the keys of the role and the content; Arrow fills keys that other rows have with nulls."""
    return ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")


def _unread(message: dict) -> list[str]:
    read = {*_keys(message), *_CALLS, *_REASONING, *_OF_TOOLS, *_LEARNED}
    return [key for key, value in message.items() if key not in read and not is_empty(value)]


def _role(value: Any, key: str, what: str) -> str:
    known = {role: role for role in ROLES} | _OTHER_ROLES if key == "role" else _SPEAKERS
    if isinstance(value, str) and value in known:
        return known[value]
    said = "has the role" if key == "role" else "is from"
    raise BadRow(f"{what} {said} {shorten(value)}; allowed are {', '.join(known)}")


def _content(value: Any, found: Message, what: str) -> str:
    """Return the content as text: parts of the type text are joined, as chat templates do."""
    if isinstance(value, list):
        value = "".join(_part(part, f"part {n} of {what}") for n, part in enumerate(value, start=1))
    if "tool_calls" in found and is_empty(value):
        return ""
    if found["role"] == "tool" and value == "":  # a tool may well answer nothing
        return value
    return text(value, f"the content of {what}")


def _part(part: Any, what: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        found = f"the type {shorten(part.get('type'))}" if isinstance(part, dict) else f"{kind(part)} {shorten(part)}"
        raise BadRow(f"{what} is {found}; only parts of the type text are learned; remove it, or the row")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"{what} has no `text`; write one, or remove the part")
    return part["text"]


def _is_learned(message: dict, what: str) -> bool:
    key = next((key for key in _LEARNED if message.get(key) is not None), None)
    if key is None:
        return True
    if message[key] not in (0, 1):
        raise BadRow(f"{what} has the {key} {shorten(message[key])}; allowed are 0 (not learned) and 1 (learned)")
    return bool(message[key])


def _first(message: dict, keys: tuple[str, ...]) -> str | None:
    """Return the first of the keys that has a value."""
    return next((key for key in keys if not is_empty(message.get(key))), None)


def _only_of_answers(key: str, role: str, what: str) -> None:
    if role != "assistant":
        raise BadRow(f"{what} has `{key}` and the role {role}; only a message by the assistant can have it")
