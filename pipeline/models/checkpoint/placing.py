"""Bytes at their places in a file whose layout is known beforehand: how they get there, and whether all came."""

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
    """Do spans (start, stop) reach from 0 to `size`? What came twice does not stand in for what never came."""
    position = 0
    for start, stop in sorted(spans):
        if start > position:
            return False
        position = max(position, stop)
    return position == size
