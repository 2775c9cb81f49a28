"""The forms that rows of a data set may have, and the conversation or text that a row becomes.

A data form is one entry in `FORMS`: the columns it needs, optional columns, and a function from their values to an
`Example`. `choose_layout` finds the form of a data set and the names of its columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.messages import Message, messages
from pipeline.data.rows import BadRow, columns_of, shorten, text


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation with at least one message by the assistant, or a plain text.

    Attributes:
        messages: `role` and `content` each; empty for a text.
        text: None for a conversation.
    """

    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None

    @property
    def last_answer(self) -> int:
        """Return the index of the last message by the assistant."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    def canonical(self) -> str:
        """Return the same text for the same example, whatever the file looked like."""
        return _canonical(self.messages if self.text is None else {"text": self.text})

    def answers(self, loss_on: str = "auto") -> list[int]:
        """Return the indexes of the messages that are learned; `loss_on` as in `train.loss_on`."""
        found = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return found[-1:] if loss_on == "completion" else found

    def prompt(self, loss_on: str = "auto") -> str:
        """Return everything before the first learned answer in canonical form; a text is its own prompt.

        A greeting before the first question is no answer to anything, so it belongs to the prompt.
        """
        return self.prompts(loss_on)[0]

    def prompts(self, loss_on: str = "auto") -> list[str]:
        """Return everything before each learned answer in canonical form; a text is its own prompt."""
        if self.text is not None:
            return [self.canonical()]
        return [_canonical(self.messages[:i]) for i in self._replies(loss_on)]

    def contexts(self, loss_on: str = "auto") -> list[bytes]:
        """Return a digest of everything before each learned answer; of a text, that of the text."""
        beginnings = self._beginnings()
        return [beginnings[i] for i in self._replies(loss_on)] if self.text is None else beginnings

    def learned_in_context(self, loss_on: str = "auto") -> list[bytes]:
        """Return a digest of each learned answer with everything before it; of a text, that of the text."""
        beginnings = self._beginnings()
        return [beginnings[i + 1] for i in self.answers(loss_on)] if self.text is None else beginnings

    def _beginnings(self) -> list[bytes]:
        """Return the digests of the first 0, 1, 2, ... messages; of a text, its one digest."""
        so_far = hashlib.blake2b(digest_size=16)
        if self.text is not None:
            so_far.update(self.canonical().encode())
        digests = [so_far.digest()]
        for message in self.messages:
            so_far.update(_canonical(message).encode() + b"\n")
            digests.append(so_far.digest())
        return digests

    def _replies(self, loss_on: str) -> list[int]:
        """Return the learned answers without greetings, or the first one if all are greetings."""
        asked = next((i for i, message in enumerate(self.messages) if message["role"] in ("user", "tool")), 0)
        answers = self.answers(loss_on)
        return [i for i in answers if i > asked] or answers[:1]

    def learned(self) -> list[str]:
        """Return what is to be learned: the answers, or the text."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"] if self.text is None else [self.text]


_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True)
class Form:
    """The columns of a data form, and the function that reads them.

    Attributes:
        needed: columns that every row has.
        read: a row -> its example; raises BadRow.
        optional: columns that a row may have.
        also: other common names of columns, taken where there is no column of the proper name.
    """

    needed: tuple[str, ...]
    read: Callable[[_Row], Example]
    optional: tuple[str, ...] = ("system", "tools")
    also: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the needed columns and the optional ones."""
        return self.needed + self.optional


@dataclass(frozen=True)
class _Row:
    """The values of a row by the form's columns, and the names of these columns in the data set."""

    values: dict[str, Any]
    names: Mapping[str, str]

    def has(self, column: str) -> bool:
        return self.values.get(column) not in (None, "")

    def text(self, column: str) -> str:
        return text(self.values[column], f"`{self.names[column]}`")

    def messages(self, column: str) -> list[Message]:
        return messages(self.values[column], self.names[column])


def _from_messages(row: _Row) -> Example:
    return _conversation(row, row.messages("messages"))


def _from_prompt_completion(row: _Row) -> Example:
    """Return the example of two strings or, as in trl, of two lists of messages."""
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.values[column], list):
            turns += (part := row.messages(column))
            if column == "completion" and all(message["role"] != "assistant" for message in part):
                raise BadRow(f"`{row.names[column]}` has no message by the assistant; add one")
        else:
            turns.append({"role": role, "content": row.text(column)})
    return _conversation(row, turns)


def _from_instruction(row: _Row) -> Example:
    """Return the example of an instruction; the input stands below it after an empty line."""
    asked = [row.text("instruction"), *([row.text("input")] if row.has("input") else [])]
    return _conversation(row, _pair("\n\n".join(asked), row.text("output")))


def _from_question_answer(row: _Row) -> Example:
    return _conversation(row, _pair(row.text("question"), row.text("answer")))


def _from_text(row: _Row) -> Example:
    return Example(text=row.text("text"))


def _pair(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _conversation(row: _Row, turns: list[Message]) -> Example:
    if row.values.get("tools"):
        raise BadRow("`tools` is not supported; remove it, or the rows that have it")
    if row.has("system"):
        turns = [{"role": "system", "content": row.text("system")}, *turns]
    if not any(message["role"] == "assistant" for message in turns):
        raise BadRow("no message by the assistant, so nothing to learn; add one, or remove the row")
    for number, message in enumerate(turns, start=1):
        if message["role"] == "system" and number > 1:
            raise BadRow(f"message {number} is a system message; move it to the front")
    return Example(tuple(turns))


FORMS: dict[str, Form] = {
    "messages": Form(("messages",), _from_messages, also={"messages": "conversations"}),
    "prompt_completion": Form(("prompt", "completion"), _from_prompt_completion),
    "instruction": Form(
        ("instruction", "output"),
        _from_instruction,
        ("input", "system", "tools"),
        {"output": "response", "input": "context"},
    ),
    "question_answer": Form(("question", "answer"), _from_question_answer),
    "text": Form(("text",), _from_text, ()),
}


@dataclass(frozen=True)
class Layout:
    """A form, and the names of its columns in a data set.

    Attributes:
        form: a key of `FORMS`.
        names: the form's column -> the name it has in the data set.
        unused: columns of the data set that nothing is read from.
    """

    form: str
    names: Mapping[str, str]
    unused: tuple[str, ...] = ()

    def example(self, row: Any) -> Example:
        """Return the example that a row becomes.

        Raises:
            BadRow: if it is malformed.
        """
        row, form = columns_of(row), FORMS[self.form]
        for column in form.needed:
            if self.names[column] not in row:
                needed = " and ".join(self.names[c] for c in form.needed)
                raise BadRow(f"no `{self.names[column]}`; every row needs {needed}")
        return form.read(_Row({column: row[name] for column, name in self.names.items() if name in row}, self.names))


def choose_layout(columns: Iterable[str], wanted: str, named: Mapping[str, str]) -> Layout:
    """Return the form of rows with these columns, and the names of its columns.

    A column is taken under the name that `named` gives it, else under its own, else under another
    common one (`Form.also`). With "auto", plain text is taken only where no other form fits.

    Args:
        columns: the columns of the data set, or of its first row.
        wanted: a form that is demanded, or "auto".
        named: a form's column -> its name in the data set; see `check_names`.

    Raises:
        BadRow: if the columns have not the form, no known form, or more than one.
    """
    columns = list(columns)
    found = shorten(", ".join(columns), 200) or "none"
    for column, name in named.items():
        if name not in columns and not _optional(column, wanted):
            raise BadRow(f"data.columns: {column} is `{name}`, which is not there; columns found are {found}")
    layouts = [
        _layout(form, columns, named)
        for form in (FORMS if wanted == "auto" else (wanted,))
        if set(named) <= set(FORMS[form].columns)
    ]
    fitting = [layout for layout in layouts if {layout.names.get(c) for c in FORMS[layout.form].needed} <= set(columns)]
    if len(fitting) > 1:
        fitting = [layout for layout in fitting if layout.form != "text"]
    if len(fitting) > 1:
        forms = " and ".join(layout.form for layout in fitting)
        raise BadRow(f"columns fit several forms: {forms}; set data.form to one of them")
    if not fitting and wanted != "auto":
        needed = " and ".join(FORMS[wanted].needed)
        raise BadRow(f"the form {wanted} needs the columns {needed}; found are {found}; name them in data.columns")
    if not fitting:
        known = "; or ".join(" and ".join(form.needed) for form in FORMS.values())
        raise BadRow(f"no known form: columns found are {found}; rename them, or name them in data.columns, to {known}")
    (layout,) = fitting
    if wanted == "auto" and layout.form == "question_answer" and "context" in layout.unused:
        raise BadRow(
            "`context` beside question and answer would be left out; set data.form: question_answer to do so, "
            "or data.columns: {instruction: question, input: context, output: answer}"
        )
    return layout


def check_names(wanted: str, named: Mapping[str, str]) -> None:
    """Raise an error if `data.columns` cannot make sense for any data set.

    Raises:
        BadRow: if it names columns that no form has, or one column twice.
    """
    forms = FORMS.values() if wanted == "auto" else (FORMS[wanted],)
    known = list(dict.fromkeys(column for form in forms for column in form.columns if column != "tools"))
    for column in named:
        if column not in known:
            of = "any form" if wanted == "auto" else f"the form {wanted}"
            raise BadRow(f"data.columns: {shorten(column)} is no column of {of}; allowed are {', '.join(known)}")
    if not any(set(named) <= set(form.columns) for form in forms):
        raise BadRow(f"data.columns: {', '.join(named)} are not columns of one form; name those of one")
    for column, name in named.items():
        if list(named.values()).count(name) > 1:
            raise BadRow(f"data.columns: `{name}` is named twice; {column} and another cannot be the same")


def _optional(column: str, wanted: str) -> bool:
    """Return True if rows may lack a column; then only all rows together show that its name is wrong."""
    forms = FORMS.values() if wanted == "auto" else (FORMS[wanted],)
    return all(column not in form.needed for form in forms)


def _layout(form: str, columns: list[str], named: Mapping[str, str]) -> Layout:
    taken = set(named.values())

    def name(column: str) -> str:
        if column in named:
            return named[column]
        other = FORMS[form].also.get(column)
        free = [n for n in (column, other) if n in columns and n not in taken]
        return free[0] if free else column

    names = {column: name(column) for column in FORMS[form].columns}
    # A column that is named for something else is not itself any more.
    names = {c: n for c, n in names.items() if c in named or n not in taken}
    return Layout(form, names, tuple(c for c in columns if c not in names.values()))
