"""A source of rows: a file, or a split of a data set on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[str, Any]  # (its place, as "line 3" or "row 3"; its content, or a BadRow if it cannot be read)


@dataclass(frozen=True)
class Table:
    """A source of rows whose beginning can be read.

    Attributes:
        name: what errors call it.
        columns: the columns of all rows; None if every row says its own.
        read: the rows from the first; given names, other columns may be left out.
    """

    name: str
    columns: tuple[str, ...] | None
    read: Callable[[Sequence[str]], Iterator[Row]]
