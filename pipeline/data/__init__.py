"""Any supported data set -> conversations, split into training and held-out.

    data_set = load_examples(config.data)
    write_examples("train.jsonl", data_set.train)

`pipeline.data.encode` turns conversations into tokens. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Data
from pipeline.data.forms import Example, detect_form, to_example
from pipeline.data.sources import (
    BUILTIN,
    hub_metadata,
    locate,
    read_examples,
    read_hub,
    read_lines,
    write_examples,
)
from pipeline.errors import DataError

__all__ = ["DataSet", "Example", "check_source", "general_text", "load_examples", "read_examples", "write_examples"]

_CHECKED_ROWS = 10  # rows that are looked at before any work
TOPICS = "builtin:python-topics"


@dataclass(frozen=True)
class DataSet:
    """A data set that is ready to train on.

    Attributes:
        source: as the configuration names it.
        form: the form found: a key of `catalog.DATA_FORMS`, or "builtin".
        train: what to train on, in an order that does not depend on the order of the rows.
        held_out: what to measure on; shares no prompt with `train`.
        rows: rows read.
        duplicates: rows dropped because the same conversation came before.
        fingerprint: sha256, in hex, over the examples of both splits.
        license, language: what the source itself says, else None.
    """

    source: str
    form: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    rows: int
    duplicates: int
    fingerprint: str
    license: str | None = None
    language: str | None = None


def load_examples(data: Data) -> DataSet:
    """Read a data set, drop duplicates, take `data.limit` examples, and split.

    The result depends on the rows, the seed, the limit and the share, and on nothing
    else: neither on the order of the rows nor on the machine.

    Raises:
        DataError: if the source cannot be read, a row is malformed, or there is too little to split.
    """
    license = language = None
    if _is_builtin(data.source):
        from pipeline.data import python_docs

        form, examples = "builtin", python_docs.python_docs()
        license, language = python_docs.LICENSE, python_docs.LANGUAGE
    else:
        form, examples = _read(data)
        if locate(data.source) is None:
            license, language = hub_metadata(data.source)
    unique = {example.canonical(): example for example in examples}
    kept = sorted(unique, key=lambda text: _shuffled(data.seed, "order", text))[: data.limit]
    train, held_out = _split([unique[text] for text in kept], data)
    return DataSet(
        source=data.source,
        form=form,
        train=train,
        held_out=held_out,
        rows=len(examples),
        duplicates=len(examples) - len(unique),
        fingerprint=_fingerprint(train, held_out),
        license=license,
        language=language,
    )


def check_source(data: Data) -> None:
    """The checks that cost nothing: is it there, can it be read, do the first rows parse?

    Touches no network: of a data set on the Hub only the name is checked.

    Raises:
        DataError: if training on it is sure to fail.
    """
    if _is_builtin(data.source):
        return
    path = locate(data.source)
    if path is not None:
        columns, rows = _open_file(path, data.source)
        form = detect_form(columns, data.form, f"{data.source}, row {rows[0][0]}")
        for number, row in rows:
            to_example(row, form, f"{data.source}, row {number}")


def general_text(source: str) -> str:
    """The text that general ability is measured on.

    Args:
        source: `builtin:python-topics`, or the path of a .txt file in UTF-8.

    Raises:
        DataError: if there is no such text, or it is empty.
    """
    if source == TOPICS:
        from pipeline.data.python_docs import python_topics

        return python_topics()
    if source.startswith("builtin:") or not source.lower().endswith(".txt"):
        raise DataError(f"{source}: no general text; set evaluate.general to {TOPICS} or a .txt file")
    try:
        text = Path(os.path.expanduser(source)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise DataError(f"{source}: is empty; set evaluate.general to {TOPICS} or another .txt file")
    return text


def _is_builtin(source: str) -> bool:
    if source.startswith("builtin:") and source != BUILTIN:
        raise DataError(f"{source}: no such builtin data set; there is {BUILTIN}")
    return source == BUILTIN


def _read(data: Data) -> tuple[str, list[Example]]:
    path = locate(data.source)
    if path is None:
        columns, rows = read_hub(data.source, data.split)
        name = f"{data.source} ({data.split})"
        form = detect_form(columns, data.form, name)
    else:
        columns, first = _open_file(path, data.source)
        name = data.source
        form = detect_form(columns, data.form, f"{name}, row {first[0][0]}")
        rows = read_lines(path, name)
    examples = [to_example(row, form, f"{name}, row {number}") for number, row in rows]
    if not examples:
        raise DataError(f"{name}: has no rows; correct data.source or data.split")
    return form, examples


def _open_file(path: Path, name: str) -> tuple[list[str], list[tuple[int, object]]]:
    """The columns of a file's first row, and its first rows."""
    rows = list(itertools.islice(read_lines(path, name), _CHECKED_ROWS))
    if not rows:
        raise DataError(f"{name}: has no rows; write one JSON object a line")
    number, first = rows[0]
    if not isinstance(first, dict):
        to_example(first, "messages", f"{name}, row {number}")  # says what is wrong with it
    return list(first), rows


def _split(examples: Sequence[Example], data: Data) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and held-out examples. All answers to one prompt go to one side."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt(), []).append(example)
    if len(groups) < 2:
        few = f"{len(examples)} different example(s)" if len(examples) < 2 else "all examples have the same prompt"
        raise DataError(f"{data.source}: too small to hold something out: {few}; at least 2 prompts are needed")
    wanted = max(1, round(data.held_out * len(examples)))
    order = sorted(groups, key=lambda prompt: _shuffled(data.seed, "split", prompt))
    chosen: set[str] = set()
    held = 0
    for prompt in order:
        if held + len(groups[prompt]) <= wanted and len(chosen) < len(groups) - 1:
            chosen.add(prompt)
            held += len(groups[prompt])
    if not chosen:  # every prompt has more answers than were to be held out
        chosen.add(min(order, key=lambda prompt: len(groups[prompt])))
    held_out = tuple(example for example in examples if example.prompt() in chosen)
    train = tuple(example for example in examples if example.prompt() not in chosen)
    return train, held_out


def _shuffled(seed: int, purpose: str, text: str) -> bytes:
    """A sort key that is as good as random, and the same everywhere."""
    return hashlib.sha256(f"{seed}\n{purpose}\n{text}".encode()).digest()


def _fingerprint(*splits: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for example in split:
            digest.update(example.canonical().encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()
