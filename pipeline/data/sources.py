"""The source that a configuration names: a file, a data set on the Hub, or the builtin one."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config.schema import REPO_ID, Data
from pipeline.data.files import ENDINGS
from pipeline.data.layout import check_names
from pipeline.data.packed import PACKED, ending_of
from pipeline.data.rows import BadRow
from pipeline.errors import DataError

BUILTIN = "builtin:python-docs"
BUILTINS = {
    BUILTIN: "the docstrings of Python's standard library, as questions and answers",
    f"{BUILTIN}-pairs": "the docstrings of Python's standard library, each with a worse answer",
}

# A source that ends like one of these is meant as a file, not as USER/NAME on the Hub.
_PACKED = (PACKED, ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z")
_FILE_ENDINGS = (*ENDINGS, *_PACKED, ".md", ".yaml", ".yml", ".arrow", ".xlsx", ".xls", ".pkl", ".db", ".xml")
_PLAIN = [ending for ending in ENDINGS if not ending.endswith(PACKED)]
_SUPPORTED = f"supported are {', '.join(_PLAIN)}, and all but .parquet packed as {PACKED}"


def is_builtin(source: str) -> bool:
    """Return True if `source` is a data set that every Python has.

    Raises:
        DataError: if it is called builtin, and is not.
    """
    if source.startswith("builtin:") and source not in BUILTINS:
        raise DataError(f"{source}: no such builtin data set; there is {' and '.join(BUILTINS)}")
    return source in BUILTINS


def locate(source: str) -> Path | None:
    """Return the file that `source` names, or None if it names a data set on the Hub.

    Raises:
        DataError: if it is neither, or a file that is not there or of a kind not read here.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        raise DataError(f"{source}: is a folder; name one file in it, or join its files into one ({_SUPPORTED})")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise DataError(f"{source}: is not a regular file; {_SUPPORTED}")
        ending = Path(path).suffix.lower()
        if ending_of(path) not in ENDINGS and ending in _PACKED:
            raise DataError(f"{source}: {ending} is packed; unpack it first ({_SUPPORTED})")
        if ending_of(path) not in ENDINGS:
            raise DataError(f"{source}: {ending or 'no ending'} is not read here; {_SUPPORTED}")
        return Path(path)
    if names_a_file(source):
        raise DataError(f"{source}: no such file; correct data.source")
    if not REPO_ID.match(source) or ".." in source or "--" in source:
        raise DataError(f"{source}: neither a file nor a data set on the Hub (USER/NAME) nor {BUILTIN}")
    return None


def names_a_file(source: str) -> bool:
    """Return True if `source` is written like a file, whether or not it exists."""
    return source.startswith((".", "/", "~")) or source.lower().endswith(_FILE_ENDINGS)


def check_settings(data: Data, on_hub: bool) -> None:
    """Raise an error if the settings do not apply to this kind of source.

    Raises:
        DataError: if one would be passed over, or names columns that no form has.
    """
    for key in ("subset", "split", "revision"):
        if not on_hub and getattr(data, key) != Data.model_fields[key].default:
            raise DataError(f"data.{key} {getattr(data, key)!r}: is for data sets on the Hub; remove it")
    if data.columns and data.source in BUILTINS:
        raise DataError(f"data.columns: {data.source} has no columns to name; remove it")
    try:
        check_names(data.form, data.columns)
    except BadRow as error:
        raise DataError(str(error)) from None
