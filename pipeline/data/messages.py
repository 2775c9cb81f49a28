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
# Keys that say whether an answer is learned: those of OpenAI, LLaMA-Factory, axolotl and ms-swift.
_LEARNED = ("weight", "loss_weight", "train", "training", "loss")
_PARTS = ("text", "reasoning", "tool_call")  # types of the parts that content may be a list of
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
    calls, reasoning = _first(message, _CALLS), _first(message, _REASONING)
    if content_key not in message and not calls:
        raise BadRow(f"{what} has no `{content_key}`; found are {shorten(', '.join(message)) or 'no keys'}")
    content = message.get(content_key)
    if message[role_key] == "function_call":
        content = [{"type": "tool_call", "value": content}]
    parts = _parts(content, what) if isinstance(content, list) else {"text": [content]}
    found: Message = {"role": role}
    if called := [*([message[calls]] if calls else []), *parts.get("tool_call", ())]:
        _only_of_answers(calls or "tool_call", role, what)
        found["tool_calls"] = [call for value in called for call in read_calls(value, what)]
    found["content"] = _content(parts.get("text", [None]), found, what)
    if reasoned := [*([message[reasoning]] if reasoning else []), *parts.get("reasoning", ())]:
        _only_of_answers(reasoning or "reasoning", role, what)
        found["reasoning_content"] = "\n\n".join(text(said, f"the reasoning of {what}") for said in reasoned)
    if role == "tool":
        named = [key for key in _OF_TOOLS if not is_empty(message.get(key))]
        found |= {key: text(message[key], f"the {key} of {what}") for key in named}
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


def _content(texts: list[Any], found: Message, what: str) -> str:
    """Return the text of a message: its parts joined, as chat templates do."""
    value = "".join(texts) if len(texts) != 1 else texts[0]
    if "tool_calls" in found and is_empty(value):
        return ""
    if found["role"] == "tool" and value == "":  # a tool may well answer nothing
        return value
    return text(value, f"the content of {what}")


def _parts(value: list, what: str) -> dict[str, list[Any]]:
    """Return the parts of a content by their types; LLaMA-Factory calls the text of a part `value`."""
    found: dict[str, list[Any]] = {"text": []}
    for number, part in enumerate(value, start=1):
        told = f"part {number} of {what}"
        if not isinstance(part, dict) or part.get("type") not in _PARTS:
            is_what = (
                f"the type {shorten(part.get('type'))}" if isinstance(part, dict) else f"{kind(part)} {shorten(part)}"
            )
            raise BadRow(f"{told} is {is_what}; allowed are {', '.join(_PARTS)}; remove it, or the row")
        content = next((part[key] for key in ("text", "value") if part.get(key) is not None), None)
        if not isinstance(content, str):
            raise BadRow(f"{told} has no `text`; write one, or remove the part")
        found.setdefault(part["type"], []).append(content)
    return found


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
