"""Writing bytes at planned places of a file, and checking that all of them arrived."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import CheckpointError


def put(descriptor: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write all of `data` at `offset`; any number of threads may, each at a place of its own.

    Raises:
        CheckpointError: naming `path`, which the file is to become.
    """
    view, done = memoryview(data), 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def is_covered(spans: Iterable[tuple[int, int]], size: int) -> bool:
    """Return True if spans (start, stop) cover 0 to `size`; bytes written twice do not replace missing ones."""
    position = 0
    for start, stop in sorted(spans):
        if start > position:
            return False
        position = max(position, stop)
    return position == size
