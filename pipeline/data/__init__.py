"""Any supported data set -> conversations or texts, split into training and held-out examples.

    data_set = load_examples(config.data, config.train.loss_on)
    write_examples("train.jsonl", data_set.train)

`pipeline.data.encode` turns them into tokens, `pipeline.data.describe` says what they are. Nothing here
imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Data
from pipeline.data.example import Example
from pipeline.data.files import open_file
from pipeline.data.part import Part, check_kinds, read_part
from pipeline.data.reading import Check, OnSkip, Skipped, read_table
from pipeline.data.rows import BadRow
from pipeline.data.sources import check_settings, is_builtin, locate
from pipeline.data.splitting import apart, fingerprint, in_order, repeat, split, trained_from
from pipeline.data.store import read_examples, write_examples
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

_NAMED_ROWS = 10  # bad rows of all sources that are named
_CHECKED_ROWS = 10  # rows that are looked at before any work
TOPICS = "builtin:python-topics"
_BETWEEN_DOCUMENTS = re.compile(r"\f|\n(?:[ \t]*\n){2,}|\n(?= = [^=\n]+ = \n)")


@dataclass(frozen=True)
class DataSet:
    """A data set that is ready to train on.

    Attributes:
        source: as the configuration names it; several are joined with commas.
        form: the form found: a key of `catalog.DATA_FORMS`, or "builtin"; several are joined with "and".
        train: what to train on, in an order that does not depend on the order of the rows.
        held_out: what to measure on; no answer in it is learned in the same context in `train`.
        rows: rows read, good and bad.
        duplicates: good rows dropped because the same example came before.
        fingerprint: sha256, in hex, over the examples of both splits, with those that a chat template refuses.
        trained_from: where in the order of the split training begins; see `splitting.trained_from`.
        loss_on: the answers that are learned, as in `train.loss_on`.
        license, language: what the source itself says; None if one says nothing.
        subset, split, revision: of a single data set on the Hub; the revision is the commit that was read. Else None.
        skipped: bad rows that were left out.
        unused: columns, and keys of messages, that nothing was read from.
        parts: the sources of the training data, and then that of the held-out examples if they have their own.
        kept_out: training examples left out because they learn an answer in the context of one of `data.validation`.
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
    parts: tuple[Part, ...] = ()
    kept_out: int = 0


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
    refused: set[str] = set()

    def checked(example: Example) -> None:
        try:
            if check:
                check(example)
        except BadRow:
            refused.add(example.canonical())
            raise

    limits = [rows.limit for rows in data.sources] or [None]  # `data.limit` is for all sources together
    limits += [data.validation.limit] if data.validation else []
    reads = [
        read_part(part, limit, _naming(data, part, on_skip), checked)
        for part, limit in zip(data.all_parts, limits, strict=True)
    ]
    check_kinds(reads)
    own = reads.pop() if data.held_out_part else None
    examples = [example for read in reads for example in read.examples]
    kept_out = 0
    if own is None:
        train, held_out, duplicates = split(examples, data, loss_on)
    else:
        held_out, unique = in_order(own.examples, data.seed), in_order(examples, data.seed)
        train = apart(unique[: data.limit], held_out, loss_on)
        duplicates, kept_out = len(examples) - len(unique), len(unique[: data.limit]) - len(train)
        if not train:
            raise DataError(f"{data.named}: every prompt is in {own.part.source} too. Try: another data.validation")
    if data.sources:
        pairs = zip(reads, data.sources, strict=True)
        weights = [(e.canonical(), rows.weight) for read, rows in pairs for e in read.examples]
        train = repeat(train, dict(reversed(weights)), data.seed)  # the first source of an example counts
        if not train:
            raise DataError(f"data.sources: no example is left for training. Try: a larger weight than {weights[0][1]}")
    reads += [own] if own else []
    facts = [read.part for read in reads]
    only = facts[0] if len(facts) == 1 else Part("", "", 0)
    skipped = [read.skipped for read in reads]
    return DataSet(
        source=data.named,
        form=" and ".join(dict.fromkeys(part.form for part in facts)),
        train=tuple(example for example in train if example.canonical() not in refused) if refused else train,
        held_out=tuple(example for example in held_out if example.canonical() not in refused) if refused else held_out,
        rows=sum(part.rows for part in facts),
        duplicates=duplicates,
        fingerprint=fingerprint(train, held_out),
        trained_from=trained_from(train, data.seed, loss_on),
        loss_on=loss_on,
        license=_of_all(part.license for part in facts),
        language=_of_all(part.language for part in facts),
        subset=only.subset,
        split=only.split,
        revision=only.revision,
        skipped=Skipped(sum(s.total for s in skipped), tuple(row for s in skipped for row in s.first)[:_NAMED_ROWS]),
        unused=tuple(dict.fromkeys(column for read in reads for column in read.unused)),
        parts=tuple(facts),
        kept_out=kept_out,
    )


def check_source(data: Data) -> None:
    """Raise an error if training on the source is sure to fail, by checks that cost nothing.

    Touches no network: of a data set on the Hub only the name is checked.

    Raises:
        DataError: if training on it is sure to fail.
    """
    for part in data.all_parts:
        path = None if is_builtin(part.source) else locate(part.source)
        check_settings(part, on_hub=path is None and not is_builtin(part.source))
        if path is not None:
            read_table(open_file(path, part.source), part, at_most=_CHECKED_ROWS)


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


def _naming(data: Data, part: Data, on_skip: OnSkip | None) -> OnSkip | None:
    """Return `on_skip` for a source, which it names if there are several."""
    if on_skip is None or len(data.all_parts) == 1:
        return on_skip
    return lambda where, reason: on_skip(f"{part.source}, {where}", reason)


def _of_all(values: Iterable[str | None]) -> str | None:
    """Return what all sources say, joined; None if one of them says nothing."""
    said = list(dict.fromkeys(values))
    return None if None in said else " and ".join(value for value in said if value)
