"""The forms that rows of a data set may have, and the conversation or text that a row becomes.

A data form is one entry in `FORMS`: the columns it needs, optional columns, and a function from their values to an
`Example`. `pipeline.data.layout` finds the form of a data set and the names of its columns.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config.catalog import PREFERENCE
from pipeline.data.example import Example, is_learned
from pipeline.data.messages import Message, messages
from pipeline.data.rows import BadRow, is_empty, kind, shorten, text
from pipeline.data.tools import read_tools


@dataclass(frozen=True)
class Form:
    """The columns of a data form, and the function that reads them.

    Attributes:
        needed: columns that every row has.
        read: a row -> its example; raises BadRow.
        optional: columns that a row may have.
        also: other common names of columns, taken if there is no column of the proper name.
    """

    needed: tuple[str, ...]
    read: Callable[[RowValues], Example]
    optional: tuple[str, ...] = ("system", "tools", "history")
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the needed columns and the optional ones."""
        return self.needed + self.optional


@dataclass(frozen=True)
class RowValues:
    """The values of a row by the form's columns.

    Attributes:
        names: the names of these columns in the data set.
        unread: gets the keys of messages that nothing is read from.
    """

    values: dict[str, Any]
    names: Mapping[str, str]
    unread: set[str] | None = None

    def has(self, column: str) -> bool:
        """Return True if the row has the column, with a value that says something."""
        return not is_empty(self.values.get(column))

    def text(self, column: str) -> str:
        """Return the text of a column, or raise BadRow."""
        return text(self.values[column], f"`{self.names[column]}`")

    def messages(self, column: str) -> list[Message]:
        """Return the messages of a column, or raise BadRow."""
        value = self.values[column]
        return messages([value] if isinstance(value, dict) else value, self.names[column], self.unread)


def _from_messages(row: RowValues) -> Example:
    return _conversation(row, row.messages("messages"))


def _from_prompt_completion(row: RowValues) -> Example:
    """Return the example of two strings or, as in trl, of two lists of messages; one message needs no list."""
    answer = _turns(row, "completion", "assistant")
    turns = [*_turns(row, "prompt", "user"), *answer]
    if all(message["role"] != "assistant" for message in answer):
        raise BadRow(f"`{row.names['completion']}` has no message by the assistant; add one")
    return _conversation(row, turns)


def _from_instruction(row: RowValues) -> Example:
    """Return the example of an instruction; the input stands below it after an empty line."""
    asked = [row.text("instruction"), *([row.text("input")] if row.has("input") else [])]
    return _conversation(row, _pair("\n\n".join(asked), row.text("output")))


def _from_question_answer(row: RowValues) -> Example:
    return _conversation(row, _pair(row.text("question"), row.text("answer")))


def _from_text(row: RowValues) -> Example:
    return Example(text=row.text("text"))


def _from_preference(row: RowValues) -> Example:
    """Return the example of a better and a worse answer, as in trl: each is text, or ends a list of messages.

    What the two lists share in the beginning is the prompt; a `prompt` need not be repeated there.
    """
    told = [f"`{row.names[column]}`" for column in ("chosen", "rejected")]
    prompt = _turns(row, "prompt", "user") if row.has("prompt") else []
    chosen, rejected = ([*_without(prompt, _turns(row, c, "assistant"))] for c in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow(f"{' and '.join(told)} are the same answer; remove the row")
    shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
    answers = [answer[len(shared) :] for answer in (chosen, rejected)]
    for answer, name in zip(answers, told, strict=True):
        if [message["role"] for message in answer] != ["assistant"]:
            raise BadRow(
                f"{name} has {len(answer)} message(s) after the prompt; one answer by the assistant is expected; "
                "shorten the conversation to the answers that differ, or remove the row"
            )
    asked = [*prompt, *shared]
    if not any(message["role"] != "system" for message in asked):
        raise BadRow(
            f"no prompt for {' and '.join(told)}; name its column in data.columns: {{prompt: ...}}, "
            f"or learn the better text alone with data.columns: {{text: {row.names['chosen']}}}"
        )
    (better,), (worse,) = ([{k: v for k, v in m.items() if k != "weight"} for m in answer] for answer in answers)
    return replace(_conversation(row, [*asked, better]), rejected=worse)


def _turns(row: RowValues, column: str, role: str) -> list[Message]:
    """Return the messages of a column; text becomes one message with this role."""
    value = row.values[column]
    return row.messages(column) if _is_messages(value) else [{"role": role, "content": row.text(column)}]


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and ("role" in value or "from" in value))


def _without(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """Return a conversation without the prompt at its beginning, if it repeats the prompt."""
    return turns[len(prompt) :] if len(turns) > len(prompt) and turns[: len(prompt)] == prompt else turns


def _pair(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _conversation(row: RowValues, turns: list[Message]) -> Example:
    turns = [*_history(row), *turns]
    if row.has("system"):
        turns = [{"role": "system", "content": row.text("system")}, *turns]
    if not any(message["role"] == "assistant" for message in turns):
        raise BadRow("no message by the assistant, so nothing to learn; add one, or remove the row")
    if not any(map(is_learned, turns)):
        raise BadRow("every answer has weight 0, so nothing to learn; remove the row")
    for number, message in enumerate(turns, start=1):
        if message["role"] == "system" and number > 1:
            raise BadRow(f"message {number} is a system message; move it to the front")
    tools = read_tools(row.values["tools"], f"`{row.names['tools']}`") if row.has("tools") else ()
    answers = [message for message in turns if message["role"] == "assistant" and "tool_calls" not in message]
    if tools and any("<tool_call>" in message["content"] for message in answers):
        raise BadRow(
            "the answers have calls of tools as text (<tool_call>), so the template would write the tools twice; "
            f"set data.ignore: [{row.names['tools']}] to learn the text as it is"
        )
    return Example(tuple(turns), tools=tools)


def _history(row: RowValues) -> list[Message]:
    """Return earlier questions and answers; each is learned too, as LLaMA-Factory does."""
    if not row.has("history"):
        return []
    value, name = row.values["history"], row.names["history"]
    if isinstance(value, str):  # a cell of a table
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is {kind(value)} {shorten(value)}; a list of [question, answer] is expected")
    turns = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"item {number} of `{name}` is {kind(pair)} {shorten(pair)}; [question, answer] is expected")
        turns += _pair(*(text(said, f"item {number} of `{name}`") for said in pair))
    return turns


# Other names that common data sets have for the optional columns.
_ALSO = {"system": ("system_prompt", "system_message"), "tools": ("functions",)}

FORMS: dict[str, Form] = {
    "messages": Form(("messages",), _from_messages, ("system", "tools"), {"messages": ("conversations",), **_ALSO}),
    "prompt_completion": Form(("prompt", "completion"), _from_prompt_completion, also=_ALSO),
    "instruction": Form(
        ("instruction", "output"),
        _from_instruction,
        ("input", "system", "tools", "history"),
        {"output": ("response",), "input": ("context",), **_ALSO},
    ),
    "question_answer": Form(("question", "answer"), _from_question_answer, also=_ALSO),
    "text": Form(("text",), _from_text, ()),
    PREFERENCE: Form(
        ("chosen", "rejected"),
        _from_preference,
        ("prompt", "system", "tools", "history"),
        {"prompt": ("question", "instruction", "conversations"), **_ALSO},
    ),
}
