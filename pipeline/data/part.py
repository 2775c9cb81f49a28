"""One source of a data set, and the examples that are read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.catalog import PREFERENCE
from pipeline.config.schema import Data
from pipeline.data.example import Example
from pipeline.data.files import open_file
from pipeline.data.reading import Check, OnSkip, Skipped, read_table
from pipeline.data.sources import BUILTIN, check_settings, is_builtin, locate
from pipeline.data.splitting import in_order
from pipeline.data.table import Table
from pipeline.errors import DataError


@dataclass(frozen=True)
class Part:
    """One source of a data set.

    Attributes:
        source: as the configuration names it.
        form: the form found: a key of `catalog.DATA_FORMS`, or "builtin".
        rows: rows read, good and bad.
        license, language, subset, split, revision: as in `DataSet`.
    """

    source: str
    form: str
    rows: int
    license: str | None = None
    language: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class ReadPart:
    """The examples of one source.

    Attributes:
        part: what is known about the source.
        examples: those of its good rows.
        skipped, unused: as in `DataSet`.
    """

    part: Part
    examples: Sequence[Example]
    skipped: Skipped = Skipped()
    unused: tuple[str, ...] = ()


def read_part(data: Data, limit: int | None, on_skip: OnSkip | None, check: Check) -> ReadPart:
    """Read a single source, and take at most `limit` different examples of it.

    Raises:
        DataError: if it cannot be read, or has a bad row that may not be left out.
    """
    read = _read(data, on_skip, check)
    return read if limit is None else replace(read, examples=in_order(read.examples, data.seed)[:limit])


def _read(data: Data, on_skip: OnSkip | None, check: Check) -> ReadPart:
    if is_builtin(data.source):
        from pipeline.data import python_docs

        check_settings(data, on_hub=False)
        are_pairs = data.source != BUILTIN
        examples = python_docs.python_docs_pairs() if are_pairs else python_docs.python_docs()
        form = PREFERENCE if are_pairs else "builtin"
        about = Part(data.source, form, len(examples), license=python_docs.LICENSE, language=python_docs.LANGUAGE)
        return ReadPart(about, examples)
    table, known = _open(data)
    reading = read_table(table, data, on_skip, check=check)
    assert reading.layout is not None, "a table without a good row is refused"
    about = Part(data.source, reading.layout.form, reading.rows, **known)
    return ReadPart(about, reading.examples, reading.skipped, reading.unused)


def check_kinds(reads: Sequence[ReadPart]) -> None:
    """Check that texts, conversations and pairs of answers are not mixed.

    Raises:
        DataError: naming two sources of different kinds.
    """
    kinds = {_kind(read.part.form): read.part for read in reversed(reads)}
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise DataError(
            f"data: {one.source} has {first}, and {other.source} has {second}; they cannot be used together. "
            "Try: sources of one kind"
        )


def _kind(form: str) -> str:
    return {"text": "plain text", PREFERENCE: "pairs of answers"}.get(form, "conversations")


def _open(data: Data) -> tuple[Table, dict[str, Any]]:
    """Return the source as a table, and what is known about a data set on the Hub."""
    path = locate(data.source)
    check_settings(data, on_hub=path is None)
    if path is not None:
        return open_file(path, data.source), {}
    from pipeline.data.hub import open_hub

    found = open_hub(data)
    return found.table, {
        "license": found.license,
        "language": found.language,
        "subset": found.subset,
        "split": data.split,
        "revision": found.revision,
    }
