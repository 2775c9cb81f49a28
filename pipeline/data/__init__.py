"""Any supported data set -> conversations or texts, split into training and held-out examples.

    data_set = load_examples(config.data, config.train.loss_on)
    write_examples("train.jsonl", data_set.train)

`pipeline.data.encode` turns them into tokens, `pipeline.data.describe` says what they are. Nothing here
imports torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.catalog import PREFERENCE
from pipeline.config.schema import Data
from pipeline.data.example import Example
from pipeline.data.files import open_file
from pipeline.data.reading import Check, OnSkip, Skipped, read_table
from pipeline.data.rows import BadRow
from pipeline.data.sources import BUILTIN, check_settings, is_builtin, locate
from pipeline.data.splitting import fingerprint, split, trained_from
from pipeline.data.store import read_examples, write_examples
from pipeline.data.table import Table
from pipeline.errors import DataError

__all__ = [
    "DataSet",
    "Example",
    "Skipped",
    "check_source",
    "general_documents",
    "general_text",
    "load_examples",
    "plain_text",
    "read_examples",
    "write_examples",
]

_CHECKED_ROWS = 10  # rows that are looked at before any work
TOPICS = "builtin:python-topics"
_BETWEEN_DOCUMENTS = re.compile(r"\f|\n(?:[ \t]*\n){2,}|\n(?= = [^=\n]+ = \n)")


@dataclass(frozen=True)
class DataSet:
    """A data set that is ready to train on.

    Attributes:
        source: as the configuration names it.
        form: the form found: a key of `catalog.DATA_FORMS`, or "builtin".
        train: what to train on, in an order that does not depend on the order of the rows.
        held_out: what to measure on; no answer in it is learned in the same context in `train`.
        rows: rows read, good and bad.
        duplicates: good rows dropped because the same example came before.
        fingerprint: sha256, in hex, over the examples of both splits, with those that a chat template refuses.
        trained_from: where in the order of the split training begins; see `splitting.trained_from`.
        loss_on: the answers that are learned, as in `train.loss_on`.
        license, language: what the source itself says, else None.
        subset, split, revision: of a data set on the Hub; the revision is the commit that was read. Else None.
        skipped: bad rows that were left out.
        unused: columns, and keys of messages, that nothing was read from.
    """

    source: str
    form: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    rows: int
    duplicates: int
    fingerprint: str
    trained_from: str = ""
    loss_on: str = "auto"
    license: str | None = None
    language: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    skipped: Skipped = Skipped()
    unused: tuple[str, ...] = ()


def load_examples(
    data: Data, loss_on: str = "auto", on_skip: OnSkip | None = None, check: Check | None = None
) -> DataSet:
    """Read a data set, drop duplicates, take `data.limit` examples, and split.

    What is trained on depends on the rows, the seed, the limit, the share and the learned answers. It does not depend
    on the order of the rows, the kind of the file, or the machine.

    Args:
        loss_on: the answers that are learned, as in `train.loss_on`.
        on_skip: called with the place and the reason of every bad row that is left out.
        check: raises BadRow if an example cannot be used, because the model's chat template refuses it. Such rows are
            left out after the split, so that the split and the fingerprint do not depend on the model.

    Raises:
        DataError: if the source cannot be read, a row is malformed, or there is too little to split.
    """
    known: dict[str, Any]
    refused: set[str] = set()

    def checked(example: Example) -> None:
        try:
            if check:
                check(example)
        except BadRow:
            refused.add(example.canonical())
            raise

    if is_builtin(data.source):
        from pipeline.data import python_docs

        check_settings(data, on_hub=False)
        are_pairs = data.source != BUILTIN
        examples = python_docs.python_docs_pairs() if are_pairs else python_docs.python_docs()
        rows, form = len(examples), PREFERENCE if are_pairs else "builtin"
        known = {"license": python_docs.LICENSE, "language": python_docs.LANGUAGE}
    else:
        table, known = _open(data)
        reading = read_table(table, data, on_skip, check=checked)
        assert reading.layout is not None, "a table without a good row is refused"
        examples, rows, form = reading.examples, reading.rows, reading.layout.form
        known |= {"skipped": reading.skipped, "unused": reading.unused}
    train, held_out, duplicates = split(examples, data, loss_on)
    return DataSet(
        source=data.source,
        form=form,
        train=tuple(example for example in train if example.canonical() not in refused) if refused else train,
        held_out=tuple(example for example in held_out if example.canonical() not in refused) if refused else held_out,
        rows=rows,
        duplicates=duplicates,
        fingerprint=fingerprint(train, held_out),
        trained_from=trained_from(train, data.seed, loss_on),
        loss_on=loss_on,
        **known,
    )


def check_source(data: Data) -> None:
    """Raise an error if training on the source is sure to fail, by checks that cost nothing.

    Touches no network: of a data set on the Hub only the name is checked.

    Raises:
        DataError: if training on it is sure to fail.
    """
    path = None if is_builtin(data.source) else locate(data.source)
    check_settings(data, on_hub=path is None and not is_builtin(data.source))
    if path is not None:
        read_table(open_file(path, data.source), data, at_most=_CHECKED_ROWS)


def general_text(source: str) -> str:
    """Return the text that general ability is measured on.

    Args:
        source: `builtin:python-topics`, or the path of a .txt file in UTF-8.

    Raises:
        DataError: if there is no such text, or it is empty.
    """
    if source == TOPICS:
        from pipeline.data.python_docs import python_topics

        return "\n\n\n".join(python_topics()) + "\n"
    if source.startswith("builtin:") or not source.lower().endswith(".txt"):
        raise DataError(f"{source}: no general text; set evaluate.general to {TOPICS} or a .txt file")
    return plain_text(source)


def plain_text(source: str) -> str:
    """Return the content of a text file.

    Args:
        source: path of a file in UTF-8.

    Raises:
        DataError: if there is no such file, or it is empty.
    """
    try:
        text = Path(os.path.expanduser(source)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise DataError(f"{source}: is empty. Try: another .txt file")
    return text


def general_documents(source: str) -> tuple[str, ...]:
    """Return the documents of a general text: independent texts, so that a sample of them has a standard error.

    A file is cut at two or more empty lines, at form feeds, and before the titles of articles in WikiText.

    Args:
        source: as `general_text` takes it.

    Raises:
        DataError: if there is no such text, or it is empty.
    """
    if source == TOPICS:
        from pipeline.data.python_docs import python_topics

        return python_topics()
    return tuple(part for part in _BETWEEN_DOCUMENTS.split(general_text(source)) if part.strip())


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
