"""The data set: a look at its first rows, the form found, and columns named where none was."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.model import recipe_tree
from pipeline.cli.wizard.prompts import GoBack, Question
from pipeline.config.catalog import DATA_FORMS, PREFERENCE
from pipeline.config.schema import Data
from pipeline.data.files import open_file
from pipeline.data.layout import choose_layout
from pipeline.data.reading import find_layout, read_table
from pipeline.data.rows import BadRow, columns_of, shorten
from pipeline.data.sources import BUILTIN, BUILTINS, check_settings, is_builtin, locate
from pipeline.data.splitting import split
from pipeline.data.table import Table
from pipeline.errors import ConfigError, DataError
from pipeline.training.trainers import check_form

SHOWN_ROWS, CHECKED_ROWS = 3, 10
ANOTHER = "another"
# What may stand behind a source, as `ada/rows subset=easy split=train_sft`.
_SETTING = re.compile(r"\s+(subset|split|revision|on_bad_row|limit|ignore)=(\S+)\Z")

# Names in errors as a configuration has them, and the way to type them here.
_WAY_OUT = re.compile(r"set data\.(ignore|on_bad_row): \[?(\w+)\]?")
_TYPED = {
    "data.columns: {instruction: question, input: context, output: answer}": (
        "--columns instruction=question,input=context,output=answer"
    ),
    "set data.form: question_answer": "answer --columns question_answer",
    "set data.form to one of them": "name one of them with --columns",
    "choose one with data.subset": "write subset=NAME behind the data set's",
    "correct data.split": "write split=NAME behind the data set's",
    "correct data.source": "name another",
    "in data.columns": "with --columns",
    "data.columns": "--columns",
    **{f"data.{name}": name for name in ("subset", "split", "revision", "form", "on_bad_row", "limit", "ignore")},
}


def _about(draft: Draft) -> str:
    return (
        "What to teach it: a data file (.jsonl, .json, .csv, .tsv, .txt, .parquet), a data set on the Hub (USER/NAME, "
        f"and if it has several parts: USER/NAME subset=... split=...), or {BUILTIN}."
    )


def _default(draft: Draft) -> str:
    return draft.tree.get("data", {}).get("source", BUILTIN)


def _take(draft: Draft, answer: str) -> None:
    tree = recipe_tree(draft.recipe) if draft.recipe else draft.tree
    section = tree.get("data", {})
    if answer != section.get("source"):  # what a recipe says of its own data is not true of other data
        section = _section(answer)
        tree = recipe_tree(draft.recipe, own_data=False) if draft.recipe else tree
    with _in_its_words():
        problem = _look_at(draft, draft.config({"data": section}).data)
    draft.tree = {**tree, "data": section}
    draft.columns_problem = problem


def _look_at(draft: Draft, data: Data) -> str | None:
    """Show the first rows and the form found; or say why none was, where there is somebody to name the columns."""
    if is_builtin(data.source):
        check_settings(data, on_hub=False)
        if data.source != BUILTIN:
            _check_trainer(draft, data, PREFERENCE)
        draft.tell(BUILTINS[data.source])
        return None
    table = _open(data)
    rows = _first_rows(table, data)
    for row in rows[:SHOWN_ROWS]:
        draft.tell(_shown(row))
    if problem := _without_form(table, rows, data):
        if not (draft.interactive or draft.is_known("columns")):
            raise DataError(problem)
        return _as_typed(problem)
    _tell_form(draft, table, data)
    return None


def _section(answer: str) -> dict:
    """Return the source and the settings that follow it."""
    settings: dict[str, object] = {}
    while found := _SETTING.search(answer):
        value: object = int(found[2]) if found[1] == "limit" and found[2].isdecimal() else found[2]
        settings[found[1]] = found[2].split(",") if found[1] == "ignore" else value
        answer = answer[: found.start()]
    return {"source": answer, **settings}


@contextlib.contextmanager
def _in_its_words() -> Iterator[None]:
    """Name settings in errors as they are typed here, and not as a configuration names them."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(_as_typed(str(error))) from None


def _as_typed(problem: str) -> str:
    problem = _WAY_OUT.sub(r"write \1=\2 behind the data set's name", problem)
    for said, typed in _TYPED.items():
        problem = problem.replace(said, typed)
    return problem


def _open(data: Data) -> Table:
    path = locate(data.source)
    check_settings(data, on_hub=path is None)
    if path is not None:
        return open_file(path, data.source)
    from pipeline.data.hub import peek

    return peek(data)


def _first_rows(table: Table, data: Data) -> list:
    """Return the first rows as they are, without bad ones if those are skipped.

    Raises:
        DataError: where there are none, or one cannot be read and is not to be skipped.
    """
    rows = list(itertools.islice(table.read(table.columns or ()), CHECKED_ROWS))
    if not rows:
        raise DataError(f"{table.name}: has no rows")
    bad = [(where, row) for where, row in rows if isinstance(row, BadRow)]
    if bad and (data.on_bad_row == "refuse" or len(bad) == len(rows)):
        where, row = bad[0]
        raise DataError(f"{table.name}, {where}: {row}")
    return [row for _, row in rows if not isinstance(row, BadRow)]


def _without_form(table: Table, rows: list, data: Data) -> str | None:
    """Return the reason why no form fits the columns, or None if one fits."""
    try:
        if find_layout(table, data, CHECKED_ROWS) is None:
            choose_layout(columns_of(rows[0]), data.form, data.columns, data.ignore)  # raises the reason
    except DataError as error:
        return str(error)
    except BadRow as error:
        return f"{table.name}: {error}"
    return None


def _shown(row: object) -> str:
    cells = row.items() if isinstance(row, dict) else [("row", row)]
    return "  " + " | ".join(
        f"{shorten(str(name), 30)}: {shorten(value, 50)}".replace("\n", " ") for name, value in cells
    )


def _tell_form(draft: Draft, table: Table, data: Data) -> None:
    """Read the first rows as training will. If there are no more rows, split them as training will.

    Raises:
        DataError: where one of them cannot be used, or there are too few.
    """
    reading = read_table(table, data, at_most=CHECKED_ROWS)
    if reading.layout is None:
        where, reason = reading.skipped.first[0]
        raise DataError(f"{table.name}: none of its first rows can be used; {where}: {reason}")
    if reading.rows < CHECKED_ROWS:
        split(reading.examples, data)
    _check_trainer(draft, data, reading.layout.form)
    draft.tell(f"form {reading.layout.form}: {DATA_FORMS[reading.layout.form]}")
    if reading.unused:
        draft.tell(f"not used: {', '.join(reading.unused)}")


def _check_trainer(draft: Draft, data: Data, form: str) -> None:
    """Raise DataError if the trainer of the draft does not take rows of this form."""
    check_form(draft.config({"data": {"source": data.source}}), form)


def _about_columns(draft: Draft) -> str:
    problem = f"{draft.columns_problem}. " if draft.columns_problem else ""
    return (
        f"{problem}Say which column is what, as question=ASK,answer=REPLY or prompt=ASK,completion=REPLY or text=BODY, "
        f"or name the form ({', '.join(DATA_FORMS)}); {ANOTHER} chooses another data set."
    )


def _take_columns(draft: Draft, answer: str) -> None:
    if answer == ANOTHER and draft.interactive:
        draft.columns_problem = None
        del draft.tree["data"]
        raise GoBack("data")
    if (source := draft.tree["data"]["source"]) in BUILTINS:
        raise ConfigError(f"--columns: {source} has no columns to name; leave it out, or name another data set")
    pairs = (part.split("=", 1) for part in answer.split(",") if "=" in part)
    named = {column.strip(): name.strip() for column, name in pairs}
    form = answer if answer in DATA_FORMS else "auto"
    if not named and form == "auto":
        raise ConfigError(f"{answer!r}: write it as question=ASK,answer=REPLY, or name a form")
    section = {**draft.tree["data"], "columns": named, "form": form}
    with _in_its_words():
        data = draft.config({"data": section}).data
        _tell_form(draft, _open(data), data)
    draft.set({"data": section})
    draft.columns_problem = None


QUESTIONS = (
    Question("data", "Data set", _about, _default, _take),
    Question(
        "columns",
        "Columns",
        _about_columns,
        lambda draft: ANOTHER,
        _take_columns,
        lambda draft: draft.columns_problem is not None or draft.is_known("columns"),
    ),
)
