"""The data set: a look at its first rows, the form found, and columns named where none was."""

from __future__ import annotations

import itertools
import re

from pipeline.catalog import DATA_FORMS
from pipeline.config import Data
from pipeline.data.files import Table, open_file
from pipeline.data.forms import choose_layout
from pipeline.data.reading import read_table
from pipeline.data.rows import BadRow, columns_of, shorten
from pipeline.data.sources import BUILTIN, check_settings, is_builtin, locate
from pipeline.errors import ConfigError, DataError
from pipeline.wizard.asking import GoBack, Question
from pipeline.wizard.draft import Draft
from pipeline.wizard.model import recipe_tree

SHOWN_ROWS, CHECKED_ROWS = 3, 10
ANOTHER = "another"
# What may stand behind a source, as `ada/rows subset=easy split=train_sft`.
_SETTING = re.compile(r"\s+(subset|split|revision|on_bad_row|limit)=(\S+)\Z")


def _about(draft: Draft) -> str:
    return (
        "What to teach it: a data file (.jsonl, .json, .csv, .tsv, .parquet), a data set on the Hub (USER/NAME, and "
        f"where it has several parts: USER/NAME subset=... split=...), or {BUILTIN}."
    )


def _default(draft: Draft) -> str:
    return draft.tree.get("data", {}).get("source", BUILTIN)


def _take(draft: Draft, answer: str) -> None:
    tree = recipe_tree(draft.recipe) if draft.recipe else draft.tree
    section = tree.get("data", {})
    if answer != section.get("source"):  # what a recipe says of its own data is not true of other data
        section = _section(answer)
        tree = recipe_tree(draft.recipe, own_data=False) if draft.recipe else tree
    data = draft.config({"data": section}).data
    problem = None
    if is_builtin(data.source):
        check_settings(data, on_hub=False)
        draft.tell("the docstrings of Python's standard library, as questions and answers")
    else:
        table = _open(data)
        rows = _first_rows(table)
        for row in rows[:SHOWN_ROWS]:
            draft.tell(_shown(row))
        try:
            choose_layout(_columns(table, rows), data.form, data.columns)
        except BadRow as error:
            problem = f"{table.name}: {error}"
        if problem and not (draft.interactive or "columns" in draft.given):
            raise DataError(problem)
        if problem is None:
            _tell_form(draft, table, data)
    draft.tree = {**tree, "data": section}
    draft.columns_problem = problem


def _section(answer: str) -> dict:
    """The source, and the settings that stand behind it."""
    settings: dict[str, object] = {}
    while found := _SETTING.search(answer):
        settings[found[1]] = int(found[2]) if found[1] == "limit" and found[2].isdecimal() else found[2]
        answer = answer[: found.start()]
    return {"source": answer, **settings}


def _open(data: Data) -> Table:
    path = locate(data.source)
    check_settings(data, on_hub=path is None)
    if path is not None:
        return open_file(path, data.source)
    from pipeline.data.hub import peek

    return peek(data)


def _first_rows(table: Table) -> list:
    """The first rows as they stand; what cannot be read raises.

    Raises:
        DataError: where there are none.
    """
    rows = list(itertools.islice(table.read(table.columns or ()), SHOWN_ROWS))
    if not rows:
        raise DataError(f"{table.name}: has no rows")
    for where, row in rows:
        if isinstance(row, BadRow):
            raise DataError(f"{table.name}, {where}: {row}")
    return [row for _, row in rows]


def _columns(table: Table, rows: list) -> list[str]:
    return list(table.columns if table.columns is not None else columns_of(rows[0]))


def _shown(row: object) -> str:
    cells = row.items() if isinstance(row, dict) else [("row", row)]
    return "  " + " | ".join(
        f"{shorten(str(name), 30)}: {shorten(value, 50)}".replace("\n", " ") for name, value in cells
    )


def _tell_form(draft: Draft, table: Table, data: Data) -> None:
    """The first rows are read as training will read them.

    Raises:
        DataError: where one of them cannot be used.
    """
    reading = read_table(table, data, at_most=CHECKED_ROWS)
    draft.tell(f"form {reading.layout.form}: {DATA_FORMS[reading.layout.form]}")
    if reading.layout.unused:
        draft.tell(f"not used: {', '.join(reading.layout.unused)}")


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
    named = dict(part.split("=", 1) for part in answer.replace(" ", "").split(",") if "=" in part)
    form = answer if answer in DATA_FORMS else "auto"
    if not named and form == "auto":
        raise ConfigError(f"{answer!r}: write it as question=ASK,answer=REPLY, or name a form")
    section = {**draft.tree["data"], "columns": named, "form": form}
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
        lambda draft: draft.columns_problem is not None or "columns" in draft.given,
    ),
)
