"""`ledger.json`: the finished steps of a run, on what each depends, and the files that it made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import WorkspaceError
from pipeline.system.files import Digest, read_json


@dataclass(frozen=True)
class Entry:
    """One finished step: the fingerprint of all it depends on, and what it made."""

    fingerprint: str
    outputs: dict[str, Digest] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    finished: float = 0.0  # seconds since the epoch
    seconds: float = 0.0


def read_ledger(path: Path, bounds: Path) -> dict[str, Entry]:
    """Finished steps by key, such as `train` or `quantize/int4`; none where there is no ledger.

    What it names is published, moved and removed, so it names nothing outside the folder `bounds`.

    Raises:
        WorkspaceError: where it is not one that was written here.
    """
    entries = {}
    try:
        for key, value in read_json(path, {}).items():
            outputs = {name: Digest(**digest) for name, digest in value.pop("outputs").items()}
            if not all(_is_within(path.parent / name, bounds) for name in outputs):
                raise ValueError
            entries[key] = Entry(outputs=outputs, **value)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise WorkspaceError(f"{path}: damaged; remove it, and what it recorded is done again") from None
    return entries


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents
