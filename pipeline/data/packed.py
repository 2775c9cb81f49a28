"""Files that may be packed with gzip, by the ending of the name alone."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import IO, cast

from pipeline.errors import DataError

PACKED = ".gz"
DAMAGED = (OSError, EOFError, zlib.error)  # errors that reading a file may raise


def ending_of(path: str | os.PathLike) -> str:
    """Return the ending of a file's name in small letters, with the one below if it is packed: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [PACKED] else "".join(suffixes[-1:])


def open_bytes(path: str | os.PathLike) -> IO[bytes]:
    """Open a file for reading, unpacked if its name ends in `.gz`. Reading it may raise the errors in `DAMAGED`."""
    return cast(IO[bytes], gzip.open(path, "rb")) if ending_of(path).endswith(PACKED) else open(path, "rb")


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for one of the errors in `DAMAGED`."""
    if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile):
        return DataError(f"{name}: not a gzip file, or a damaged one ({error}); pack it again, or unpack it")
    return DataError(f"{name}: cannot be read: {error.strerror or error}")
