"""The form of a data set's rows, and the names of its columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.catalog import PREFERENCE
from pipeline.data.example import Example
from pipeline.data.forms import FORMS, RowValues
from pipeline.data.meaningful import check_watched, preference_problem, watched_columns
from pipeline.data.rows import BadRow, columns_of, shorten


@dataclass(frozen=True)
class Layout:
    """A form, and the names of its columns in a data set.

    Attributes:
        form: a key of `FORMS`.
        names: the form's column -> the name it has in the data set.
        unused: columns of the data set that nothing is read from.
        watched: those of them that may change what a row means.
    """

    form: str
    names: Mapping[str, str]
    unused: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """Return the names of the columns that every row has."""
        return [self.names[column] for column in FORMS[self.form].needed]

    def example(self, row: Any, unread: set[str] | None = None) -> Example:
        """Return the example that a row becomes.

        Args:
            unread: gets the keys of messages that nothing is read from.

        Raises:
            BadRow: if it is malformed, or has a column that changes what it means.
        """
        row, form = columns_of(row), FORMS[self.form]
        for name in self.needed:
            if name not in row:
                raise BadRow(f"no `{name}`; every row needs {' and '.join(self.needed)}")
        check_watched(row, self.watched, (*self.names.values(), *self.unused))
        values = {column: row[name] for column, name in self.names.items() if name in row}
        return form.read(RowValues(values, self.names, unread))


def choose_layout(
    columns: Iterable[str],
    wanted: str,
    named: Mapping[str, str],
    ignored: Collection[str] = (),
    of_others: Iterable[str] = (),
) -> Layout:
    """Return the form of rows with these columns, and the names of its columns.

    A column is taken under the name that `named` gives it, else under its own, else under another
    common one (`Form.also`). With "auto", plain text is taken only if no other form fits, and two answers of which one
    is better are taken as such, whatever else there is.

    Args:
        columns: the columns of the data set, or of the first row that has a form.
        wanted: a form that is demanded, or "auto".
        named: a form's column -> its name in the data set; see `check_names`.
        ignored: columns that are left out on purpose, whatever they mean.
        of_others: the columns of the other rows, from which optional ones are taken too.

    Raises:
        BadRow: if the columns have not the form, no known form, or more than one.
    """
    everything = list(dict.fromkeys([*columns, *of_others]))
    columns = [column for column in columns if column not in ignored]
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
        fitting = [layout for layout in fitting if layout.form == PREFERENCE] or fitting
    if len(fitting) > 1:
        forms = " and ".join(layout.form for layout in fitting)
        raise BadRow(f"columns fit several forms: {forms}; set data.form to one of them")
    if not fitting and (problem := preference_problem(columns)):
        raise BadRow(f"no known form: {problem}")
    if not fitting and wanted != "auto":
        needed = " and ".join(FORMS[wanted].needed)
        raise BadRow(f"the form {wanted} needs the columns {needed}; found are {found}; name them in data.columns")
    if not fitting:
        known = "; or ".join(" and ".join(form.needed) for form in FORMS.values())
        raise BadRow(f"no known form: columns found are {found}; rename them, or name them in data.columns, to {known}")
    (layout,) = fitting
    needed_names = {column: layout.names[column] for column in FORMS[layout.form].needed}
    layout = _layout(layout.form, [c for c in everything if c not in ignored], {**named, **needed_names})
    names = {column: name for column, name in layout.names.items() if name not in ignored}
    unused = tuple(column for column in everything if column not in names.values())
    watched = watched_columns(layout.form, layout.unused, names.values(), demanded=wanted != "auto")
    return Layout(layout.form, names, unused, watched)


def check_names(wanted: str, named: Mapping[str, str]) -> None:
    """Raise an error if `data.columns` cannot make sense for any data set.

    Raises:
        BadRow: if it names columns that no form has, or one column twice.
    """
    forms = FORMS.values() if wanted == "auto" else (FORMS[wanted],)
    known = list(dict.fromkeys(column for form in forms for column in form.columns))
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
        others = FORMS[form].also.get(column, ())
        free = [n for n in (column, *others) if n in columns and n not in taken]
        return free[0] if free else column

    names = {column: name(column) for column in FORMS[form].columns}
    # A column that is named for something else is not itself any more.
    names = {c: n for c, n in names.items() if c in named or n not in taken}
    return Layout(form, names, tuple(c for c in columns if c not in names.values()))
