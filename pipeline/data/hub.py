"""Data sets on the Hub, read at the one commit that is recorded.

Two habits of the `datasets` library make this more than one call. Without the network it takes whatever its cache has,
for any revision or subset. And only the name of the cache's folder tells which commit was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Data
from pipeline.data.rows import shorten, without_nulls
from pipeline.data.table import Row, Table
from pipeline.errors import DataError, install, is_unreachable
from pipeline.hub.retry import retry

_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub, and what is known about it.

    Attributes:
        revision: the commit that is read; None only where the library's cache does not tell.
        subset: the one that is read; None if there is but one without a name.
        license, language: what its card says, else None.
    """

    table: Table
    revision: str | None
    subset: str | None
    license: str | None
    language: str | None


def open_hub(data: Data) -> HubSource:
    """Download a split of a data set on the Hub. No code from its repository is run.

    Raises:
        DataError: if it cannot be had; the message says why, and what to do.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{data.source}: reading from the Hub needs a package; run: {install('datasets')}") from None
    datasets.disable_progress_bars()
    pinned, card = None, None
    try:
        # What may be on this machine already is not waited for.
        attempts = 1 if _may_be_cached(data.source, datasets.config.HF_DATASETS_CACHE) else None
        info = retry(data.source, lambda: _info(data), attempts=attempts)
        pinned, card = info.sha, info.card_data
    except Exception as error:
        if not (is_unreachable(error) and _may_be_cached(data.source, datasets.config.HF_DATASETS_CACHE)):
            raise DataError(f"{data.source}: {reason(error, data)}") from None
    with _in_one_line(data):
        options = {"name": data.subset, "split": data.split, "revision": pinned or data.revision}
        rows = retry(data.source, lambda: datasets.load_dataset(data.source, **options))
    revision = _commit_read(rows)
    _check_what_was_read(data, pinned, revision, rows.info.config_name)
    subset = data.subset or (rows.info.config_name if rows.info.config_name != "default" else None)
    name = f"{data.source} ({f'{subset}, ' if subset else ''}{data.split})"
    return HubSource(
        table=Table(name, tuple(rows.column_names), lambda columns: _read(rows, columns)),
        revision=revision or pinned,
        subset=subset,
        license=_joined(getattr(card, "license", None)),
        language=_only_one(getattr(card, "language", None)),
    )


def commit_of(data: Data) -> str:
    """Return the commit of a data set on the Hub, without downloading it.

    Raises:
        DataError: if it cannot be had; the message says why, and what to do.
    """
    with _in_one_line(data):
        return retry(data.source, lambda: _info(data)).sha


def _info(data: Data) -> Any:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(data.source, revision=data.revision, timeout=_TIMEOUT)


def peek(data: Data) -> Table:
    """Return the beginning of a split of a data set on the Hub; rows are downloaded as they are read.

    Raises:
        DataError: if it cannot be had; reading it may raise too.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{data.source}: reading from the Hub needs a package; run: {install('datasets')}") from None
    datasets.disable_progress_bars()
    with _in_one_line(data):
        rows = datasets.load_dataset(
            data.source, name=data.subset, split=data.split, revision=data.revision, streaming=True
        )
        if rows.features:
            rows = rows.decode(False)  # pictures and sound are not looked at

    def read(wanted: Sequence[str]) -> Iterator[Row]:
        with _in_one_line(data):
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", _plain(row)

    # Rows of JSON lines say their columns only as they are read.
    columns = tuple(rows.column_names) if rows.column_names else None
    return Table(f"{data.source} ({data.split})", columns, read)


@contextmanager
def _in_one_line(data: Data) -> Iterator[None]:
    """Turn every error of the library, the network or the repository into one line."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{data.source}: {reason(error, data)}") from None


def _read(rows: Any, columns: Sequence[str]) -> Iterator[Row]:
    used = [column for column in rows.column_names if column in columns]
    if used:
        rows = rows.select_columns(used)
    for column, feature in rows.features.items():
        if (undecoded := _undecoded(feature)) is not feature:
            rows = rows.cast_column(column, undecoded)
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _plain(row)


def _undecoded(feature: Any) -> Any:
    """Return the type of a column without the decoding of pictures and sound, or the same type."""
    from datasets import Audio, Image, Video

    if isinstance(feature, Audio | Image | Video):
        return type(feature)(decode=False)
    inner = getattr(feature, "feature", None)
    if inner is None or (undecoded := _undecoded(inner)) is inner:
        return feature
    return type(feature)(undecoded)


def _plain(row: dict) -> dict:
    """Return a row without the keys of its objects that Arrow filled in."""
    return {column: without_nulls(value) for column, value in row.items()}


def _commit_read(rows: Any) -> str | None:
    """Return the commit that was read: the name of the folder in which the library keeps the rows."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    commits = [folder for folder in folders if _COMMIT.match(folder)]
    return commits[0] if len(commits) == len(folders) == 1 else None


def _check_what_was_read(data: Data, pinned: str | None, read: str | None, subset: str) -> None:
    """Raise an error if the cache gave something other than what was asked for."""
    if pinned is not None:
        if read not in (None, pinned):
            raise DataError(f"{data.source}: commit {pinned[:12]} was asked for and {read[:12]} was read; try again")
        return
    if data.revision is not None and data.revision != read:
        raise DataError(
            f"{data.source}: the Hub cannot be reached, so data.revision {data.revision!r} cannot be looked up; "
            f"what is on this machine is {read}"
        )
    if data.subset is None and subset != "default":
        raise DataError(
            f"{data.source}: the Hub cannot be reached, so the subset cannot be looked up; what is on this machine "
            f"is {subset!r}: set data.subset to it"
        )


def reason(error: Exception, data: Data) -> str:
    """Return why a data set cannot be read, and what to do."""
    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        return "is gated; accept its terms on its page on the Hub, and set HF_TOKEN"
    if "OfflineModeIsEnabled" in kinds or "offline" in text.lower():
        return "is not on this machine, and the Hub is switched off (HF_HUB_OFFLINE); name a file, or unset it"
    if "RevisionNotFoundError" in kinds:
        return f"no revision {data.revision!r}; correct data.revision, or leave it out for the newest"
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return "no such data set on the Hub, or it is private: correct data.source, or set HF_TOKEN"
    if available := re.search(r"Config name is missing.*?available configs: \[(.*?)\]", text):
        return f"has several subsets ({shorten(available[1], 120)}); choose one with data.subset"
    if available := re.search(r"(?:BuilderConfig .* not found|Couldn't find cache).*: \[(.*?)\]", text):
        return f"no subset {data.subset!r}; available are {shorten(available[1], 120)}"
    if isinstance(error, ValueError) and ("split" in text or "Unrecognized instruction" in text):
        return f"no split {data.split!r} ({shorten(text, 120)}); correct data.split"
    if "EmptyDatasetError" in kinds or "DataFilesNotFoundError" in kinds:
        return "has no data files; correct data.source"
    if "scripts are no longer supported" in text:
        return "is made by a script, which is never run here; export it to a .jsonl file"
    if is_unreachable(error) or any("Connect" in kind or "Timeout" in kind for kind in kinds):
        return f"the Hub cannot be reached ({shorten(text, 120)}); try again, or name a file"
    cause = error.__cause__ or error
    if "column names don't match" in str(cause):
        return "its rows have different columns, which the datasets library does not read; name a .jsonl file instead"
    return f"cannot be loaded ({type(cause).__name__}: {shorten(str(cause), 120)}); name a .jsonl file instead"


def _may_be_cached(source: str, cache: str) -> bool:
    """Return True if the library's cache has anything of this owner."""
    owner = source.partition("/")[0]
    return any(Path(cache).expanduser().glob(f"{owner}___*"))


def _joined(value: Any) -> str | None:
    """Return one or several texts, separated by commas; None for anything else."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(values) or None if all(isinstance(one, str) for one in values) else None


def _only_one(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and value else None
