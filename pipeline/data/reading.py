"""Reading the rows of a table into examples; a bad row ends it or is skipped, as configured."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.config.schema import Data
from pipeline.data.example import Example
from pipeline.data.layout import Layout, choose_layout
from pipeline.data.rows import BadRow, columns_of
from pipeline.data.table import Table
from pipeline.errors import DataError

_REMEMBERED = 10  # skipped rows whose reasons are kept in memory
_LOOKED_AT = 1000  # rows whose columns are looked at if not all rows are read

OnSkip = Callable[[str, str], None]  # (where a row is, why it is left out)
Check = Callable[[Example], None]  # raises BadRow if nothing can be learned from an example


@dataclass(frozen=True)
class Skipped:
    """Rows left out because nothing could be learned from them.

    Attributes:
        total: how many.
        first: where the first ten are, and why they were left out.
    """

    total: int = 0
    first: tuple[tuple[str, str], ...] = ()


@dataclass
class Reading:
    """The examples of a table, and what was found while reading it.

    Attributes:
        layout: the form, and where its columns are; None until a row showed it.
        examples: one for each row that could be read, in order.
        rows: rows read, good and bad.
        unread: keys of messages that nothing is read from, as `column.key`.
    """

    layout: Layout | None
    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    skipped: Skipped = Skipped()
    unread: set[str] = field(default_factory=set)

    @property
    def unused(self) -> tuple[str, ...]:
        """Return the columns, and the keys of messages, that nothing is read from."""
        return (*(self.layout.unused if self.layout else ()), *sorted(self.unread))


def read_table(
    table: Table,
    data: Data,
    on_skip: OnSkip | None = None,
    at_most: int | None = None,
    check: Check | None = None,
) -> Reading:
    """Read a table's rows.

    Args:
        on_skip: called for each row that is left out.
        at_most: rows to look at, for a check before any work; then too many bad rows are no error yet.
        check: looks at each example, and raises BadRow if its row is bad.

    Raises:
        DataError: if it has no rows, not the form, or a bad row that may not be skipped; or if more than half of
            its rows are bad.
    """
    reading = Reading(find_layout(table, data, at_most))
    layout = reading.layout
    columns = [*layout.names.values(), *layout.watched] if layout else []
    unseen = set(data.columns.values()) - set(table.columns or ())
    for where, row in itertools.islice(table.read(columns), at_most):
        reading.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if layout is None:  # no row has a form, so this raises the reason
                layout = choose_layout(columns_of(row), data.form, data.columns, data.ignore)
            example = layout.example(row, reading.unread)
            unseen.difference_update(row)
            reading.examples.append(example)
            if check:
                check(example)
        except BadRow as bad:
            if data.on_bad_row == "refuse":
                raise DataError(f"{table.name}, {where}: {bad}") from None
            _skip(reading, where, str(bad), on_skip)
    if not reading.rows:
        raise DataError(f"{table.name}: has no rows; correct data.source or data.split")
    if at_most is None:
        _check_all(table, data, reading, unseen)
    return reading


def find_layout(table: Table, data: Data, at_most: int | None = None) -> Layout | None:
    """Return the form of a table, with the columns of all its rows; None if no row has a form.

    The first row that has a form decides it, since a later row of another form is a bad row. Optional columns are
    taken from all rows. Memory depends on the number of columns, not of rows.

    Args:
        at_most: rows that are read afterwards, if not all are; then only the columns of the first 1,000 rows count.

    Raises:
        DataError: if all rows have the same columns, and these have no form.
    """
    if table.columns is not None:
        try:
            return choose_layout(table.columns, data.form, data.columns, data.ignore)
        except BadRow as bad:
            raise DataError(f"{table.name}: {bad}") from None
    first: list[str] | None = None
    columns: dict[str, None] = {}
    for _, row in itertools.islice(table.read(()), at_most and max(at_most, _LOOKED_AT)):
        if not isinstance(row, dict):
            continue
        if first is None:
            with contextlib.suppress(BadRow):
                choose_layout(row, data.form, data.columns, data.ignore)
                first = list(row)
        columns.update(dict.fromkeys(row))
    return None if first is None else choose_layout(first, data.form, data.columns, data.ignore, columns)


def _skip(reading: Reading, where: str, reason: str, on_skip: OnSkip | None) -> None:
    first = reading.skipped.first
    if len(first) < _REMEMBERED:
        first += ((where, reason),)
    reading.skipped = Skipped(reading.skipped.total + 1, first)
    if on_skip:
        on_skip(where, reason)


def _check_all(table: Table, data: Data, reading: Reading, unseen: set[str]) -> None:
    """Raise an error for problems that only show in all rows together."""
    skipped = reading.skipped
    if skipped.total * 2 > reading.rows:
        where, reason = skipped.first[0]
        raise DataError(
            f"{table.name}: {skipped.total} of {reading.rows} rows are bad, too many to skip; "
            f"the first is {where}: {reason}"
        )
    for column, name in data.columns.items():
        if name in unseen:
            raise DataError(f"{table.name}: data.columns: {column} is `{name}`, which no row has")
