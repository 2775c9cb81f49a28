"""What a row of a data set may look like, and the conversation it becomes.

A data form is a function from a row (a dict) to messages and one entry in `FORMS`.
A row that is not what it should be is a `DataError` that names the file, the row
and what to change, in one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

# Fields that change what a message means. Reading past them would train on something else.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")


@dataclass(frozen=True)
class Example:
    """One conversation: messages of `role` and `content`, at least one by the assistant."""

    messages: tuple[dict[str, str], ...]

    @property
    def last_answer(self) -> int:
        """The index of the last message by the assistant."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    def canonical(self) -> str:
        """The same text for the same conversation, whatever the file looked like."""
        return _canonical(self.messages)

    def prompt(self) -> str:
        """Everything before the last answer, in canonical form."""
        return _canonical(self.messages[: self.last_answer])


def _canonical(messages: Iterable[dict[str, str]]) -> str:
    return json.dumps(list(messages), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def detect_form(columns: Iterable[str], wanted: str, where: str) -> str:
    """The form of rows with these columns.

    Args:
        columns: the columns of the first row.
        wanted: a form that is demanded, or "auto".
        where: the source, named in errors.

    Raises:
        DataError: if the columns do not have the form, or any known form.
    """
    columns = list(columns)
    for form in FORMS if wanted == "auto" else (wanted,):
        if set(FORMS[form][0]) <= set(columns):
            return form
    found = shorten(", ".join(columns), 200) or "none"
    if wanted != "auto":
        raise DataError(
            f"{where}: the form {wanted} needs the columns {' and '.join(FORMS[wanted][0])}; found are {found}"
        )
    known = "; or ".join(" and ".join(needed) for needed, _ in FORMS.values())
    raise DataError(f"{where}: no known form: columns found are {found}; rename them to {known}")


def to_example(row: Any, form: str, where: str) -> Example:
    """The conversation in a row.

    Args:
        row: what one line of the file held.
        form: a key of `FORMS`.
        where: the source and the row's number, named in errors.

    Raises:
        DataError: if the row is malformed.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: {_kind(row)} {shorten(row)} where an object such as {{...}} is expected")
    columns, read = FORMS[form]
    for column in columns:
        if column not in row:
            raise DataError(f"{where}: no `{column}`; every row needs {' and '.join(columns)}")
    if row.get("tools"):
        raise DataError(f"{where}: `tools` is not supported; remove it, or the rows that have it")
    messages = tuple(read(row, where))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message by the assistant, so nothing to learn; add one, or remove the row")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "system" and number > 1:
            raise DataError(f"{where}: message {number} is a system message; move it to the front")
    return Example(messages)


def _from_messages(row: dict, where: str) -> list[dict[str, str]]:
    return _messages(row["messages"], "messages", where)


def _from_prompt_completion(row: dict, where: str) -> list[dict[str, str]]:
    """Two strings, or as trl has it, two lists of messages that continue each other."""
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        if isinstance(value, list):
            messages += (part := _messages(value, column, where))
            if column == "completion" and all(message["role"] != "assistant" for message in part):
                raise DataError(f"{where}: `completion` has no message by the assistant; add one")
        else:
            messages.append({"role": role, "content": _text(value, f"`{column}`", where)})
    return messages


FORMS: dict[str, tuple[tuple[str, ...], Callable[[dict, str], list[dict[str, str]]]]] = {
    "messages": (("messages",), _from_messages),
    "prompt_completion": (("prompt", "completion"), _from_prompt_completion),
}


def _messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: `{column}` is {_kind(value)} {shorten(value)}; a list of messages is expected")
    if not value:
        raise DataError(f"{where}: `{column}` is empty; add messages, or remove the row")
    return [_message(message, f"message {n} of `{column}`", where) for n, message in enumerate(value, start=1)]


def _message(message: Any, what: str, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {what} is {_kind(message)} {shorten(message)}; {{role, content}} is expected")
    for key in ("role", "content"):
        if key not in message:
            raise DataError(f"{where}: {what} has no `{key}`; found are {shorten(', '.join(message)) or 'no keys'}")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where}: {what} has the role {shorten(role)}; allowed are {', '.join(ROLES)}")
    for key in _UNSUPPORTED:
        if message.get(key):
            raise DataError(f"{where}: {what} has `{key}`, which is not supported; remove it, or the row")
    content = message["content"]
    if role == "tool" and content == "":  # a tool may well answer nothing
        return {"role": role, "content": content}
    return {"role": role, "content": _text(content, f"the content of {what}", where)}


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {_kind(value)} {shorten(value)}; text in quotes is expected")
    if not value.strip():
        raise DataError(f"{where}: {what} is empty; write something, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} has half a character (\\u{ord(value[error.start]):04x}) at {error.start}; write it whole"
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {bool: "the value", int: "the number", float: "the number", str: "the text", list: "the list"}
    return names.get(type(value), "the object" if isinstance(value, dict) else "the value")


def shorten(value: Any, longest: int = 60) -> str:
    """A value for a message: as JSON unless it is text in prose, and never longer than `longest`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= longest else text[: longest - 3] + "..."
