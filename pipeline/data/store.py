"""The file in which a run keeps its examples between stages."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.catalog import PREFERENCE
from pipeline.data.example import Example
from pipeline.data.files import read_lines
from pipeline.data.layout import Layout
from pipeline.data.rows import BadRow
from pipeline.errors import DataError

_LAYOUTS = {
    "messages": Layout("messages", {"messages": "messages", "tools": "tools"}),
    "text": Layout("text", {"text": "text"}),
    "rejected": Layout(PREFERENCE, {name: name for name in ("prompt", "chosen", "rejected", "tools")}),
}


def write_examples(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Write examples as JSON lines, atomically.

    Each is `{"messages": [...], "tools": [...]}`, `{"text": "..."}`, or `{"prompt": [...], "chosen": [...],
    "rejected": [...], "tools": [...]}`.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            for example in examples:
                row: dict[str, Any] = {"text": example.text}
                if example.text is None:
                    row = {"messages": example.messages}
                    if example.rejected is not None:
                        *prompt, better = example.messages
                        row = {"prompt": prompt, "chosen": [better], "rejected": [example.rejected]}
                    row |= {"tools": example.tools} if example.tools else {}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def read_examples(path: str | os.PathLike) -> tuple[Example, ...]:
    """Read what `write_examples` wrote.

    Raises:
        DataError: if the file cannot be read, or a row is malformed.
    """
    examples = []
    for where, row in read_lines(path):
        try:
            if isinstance(row, BadRow):
                raise row
            columns = row if isinstance(row, dict) else ()
            form = next((column for column in ("text", "rejected") if column in columns), "messages")
            examples.append(_LAYOUTS[form].example(row))
        except BadRow as bad:
            raise DataError(f"{path}, {where}: {bad}") from None
    return tuple(examples)
