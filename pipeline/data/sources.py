"""Where rows come from: a file of JSON lines, or a data set on the Hub. And conversations as a file.

A source that cannot be read is a `DataError` in one line.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import REPO_ID
from pipeline.data.forms import FORMS, Example, shorten, to_example
from pipeline.errors import DataError

BUILTIN = "builtin:python-docs"
ENDINGS = (".jsonl", ".json")

# A source that ends like one of these is meant as a file, not as USER/NAME on the Hub.
_FILE_ENDINGS = (*ENDINGS, ".ndjson", ".csv", ".tsv", ".txt", ".md", ".yaml", ".yml", ".parquet", ".arrow", ".xlsx")
_FILE_ENDINGS += (".gz", ".zst", ".xz", ".bz2", ".zip")

Rows = Iterator[tuple[int, Any]]  # (number from 1, what the row holds)


def locate(source: str) -> Path | None:
    """The file that `source` names, or None where it names a data set on the Hub.

    Raises:
        DataError: if it is neither, or a file that is not there or of a kind not read here.
    """
    path = os.path.expanduser(source)
    supported = f"supported are {' and '.join(ENDINGS)}, one JSON object a line"
    if os.path.isdir(path):
        raise DataError(f"{source}: is a folder; name a file in it ({supported})")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise DataError(f"{source}: is not a regular file; {supported}")
        if not path.lower().endswith(ENDINGS):
            ending = Path(path).suffix or "no ending"
            raise DataError(f"{source}: {ending} is not read here; {supported}")
        return Path(path)
    if source.startswith((".", "/", "~")) or source.lower().endswith(_FILE_ENDINGS):
        raise DataError(f"{source}: no such file; correct data.source")
    if not REPO_ID.match(source) or ".." in source or "--" in source:
        raise DataError(f"{source}: neither a file nor a data set on the Hub (USER/NAME) nor {BUILTIN}")
    return None


def read_lines(path: Path, name: str | None = None) -> Rows:
    """The rows of a file of JSON lines; blank lines are ignored, and numbers are those of the lines.

    Args:
        path: a file in UTF-8, with or without a byte order mark.
        name: what errors call it; by default its path.

    Raises:
        DataError: if the file cannot be read, or at the first line that is not JSON.
    """
    name = name or str(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _parse(line, f"{name}, row {number}")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    if text.startswith("["):
        raise DataError(f"{where}: a list where one JSON object a line is expected; write every item on its own line")
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at column {error.colno}: {error.msg}; write one whole object a line"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply; a row holds messages, or a prompt and a completion") from None
    except ValueError as error:
        raise DataError(f"{where}: {shorten(str(error), 120)}") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value; write null, or remove the row")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shorten(twice)!r} stands twice; keep one")
    return row


def write_examples(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Write conversations as JSON lines, `{"messages": [...]}` each: the whole file, or no file."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            for example in examples:
                file.write(json.dumps({"messages": list(example.messages)}, ensure_ascii=False) + "\n")
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
    rows = read_lines(Path(path))
    return tuple(to_example(row, "messages", f"{path}, row {number}") for number, row in rows)


def read_hub(source: str, split: str) -> tuple[list[str], Rows]:
    """The columns and the rows of a data set on the Hub. No code from its repository is run.

    Args:
        source: USER/NAME.
        split: a split's name, or a slice of one such as `train[:1000]`.

    Raises:
        DataError: if it cannot be had; the message says why, and what to do.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading from the Hub needs a package; run: pip install datasets") from None
    try:
        dataset = datasets.load_dataset(source, split=split)
    except Exception as error:  # whatever the library, the network or the repository came up with
        raise DataError(f"{source}: {_hub_reason(error, split)}") from None
    columns = list(dataset.column_names)
    used = [c for c in columns if c in {"tools", *(c for needed, _ in FORMS.values() for c in needed)}]
    if used:
        dataset = dataset.select_columns(used)  # images and audio beside them are not decoded
    return columns, enumerate(dataset, start=1)


def _hub_reason(error: Exception, split: str) -> str:
    """Why a data set cannot be had, and the way out."""
    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "gated" in text.lower():
        return "is gated; accept its terms on its page on the Hub, and set HF_TOKEN"
    if kinds & {"OfflineModeIsEnabled"} or "offline" in text.lower():
        return "is not on this machine, and the Hub is switched off (HF_HUB_OFFLINE); name a file, or unset it"
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return "no such data set on the Hub, or it is private: correct data.source, or set HF_TOKEN"
    if "split" in text and isinstance(error, ValueError):
        return f"no split {split!r} ({shorten(text, 120)}); correct data.split"
    if "Config name is missing" in text:
        return "has several subsets, and none can be chosen here; export one to a .jsonl file"
    if "scripts are no longer supported" in text:
        return "is made by a script, which is never run here; export it to a .jsonl file"
    if isinstance(error, (ConnectionError, TimeoutError)) or any("Connect" in k or "Timeout" in k for k in kinds):
        return f"the Hub cannot be reached ({shorten(text, 120)}); try again, or name a file"
    return f"cannot be loaded ({type(error).__name__}: {shorten(text, 120)}); name a .jsonl file instead"


def hub_metadata(source: str) -> tuple[str | None, str | None]:
    """License and language in the metadata of a data set's card; None where it does not say one."""
    try:
        from huggingface_hub import HfApi

        card = HfApi().dataset_info(source, timeout=10).card_data
    except Exception:  # no card, no network: then nothing is known, and nothing is claimed
        return None, None
    return _only_one(getattr(card, "license", None)), _only_one(getattr(card, "language", None))


def _only_one(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value else None
