"""`ledger.json`: what is done of a run, on what that depends, and what a stopped stage needs to go on.

It is the only place that says what is done. Files that a step made are named by its entry, with their sha256.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pipeline.errors import WorkspaceError
from pipeline.system.files import Digest, read_json, write_json
from pipeline.workflow.former_ledger import converted


@dataclass(frozen=True)
class Entry:
    """One step: a stage, or a stage for one variant.

    Attributes:
        fingerprint: of everything that it depended on when it was last finished.
        outputs: the files that it made then, by their path in the run's folder.
        summary: its figures, as plain data.
        finished: seconds since the epoch.
        seconds: how long it took.
        progress: what it needs to go on when it is stopped, and what it need not find out again, as plain data.
        state: "running" until it is finished for the first time, also if it was stopped.
    """

    fingerprint: str = ""
    outputs: dict[str, Digest] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    finished: float = 0.0
    seconds: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)
    state: Literal["running", "done"] = "done"


@dataclass(frozen=True)
class BaseModel:
    """Where the base model lies on this machine.

    Attributes:
        model: the section of the configuration that it was fetched for.
        revision: its commit on the Hub.
        bytes: size of its weights, if these only passed by, shard by shard.
    """

    model: dict[str, Any]
    folder: str
    revision: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Ledger:
    """The content of `ledger.json`.

    Attributes:
        steps: by key, such as `train` or `quantize/int4`.
        inputs: what was read of this machine's own files, by the name that the configuration gives them.
        base: where the base model lies.
        comparison: what a retraining compares the run with, until it is published.
    """

    steps: dict[str, Entry] = field(default_factory=dict)
    inputs: dict[str, dict[str, Digest]] = field(default_factory=dict)
    base: BaseModel | None = None
    comparison: dict[str, Any] | None = None

    def done(self) -> dict[str, Entry]:
        """Return the steps that were ever finished."""
        return {key: entry for key, entry in self.steps.items() if entry.state == "done"}

    def with_entry(self, key: str, entry: Entry) -> Ledger:
        return replace(self, steps={**self.steps, key: entry})

    def without(self, key: str) -> Ledger:
        return replace(self, steps={k: entry for k, entry in self.steps.items() if k != key})


_LEDGER = TypeAdapter(Ledger)


def read_ledger(path: Path, bounds: Path) -> Ledger:
    """Return the ledger of a run; an empty one if there is none.

    What it names is published, moved and removed, so it names nothing outside the folder `bounds`.

    Raises:
        WorkspaceError: if it is not one that was written here.
    """
    try:
        content = read_json(path, {})
        ledger = _LEDGER.validate_python(content if "steps" in content else converted(content, path.parent))
        named = (path.parent / name for entry in ledger.steps.values() for name in entry.outputs)
        if not all(_is_within(file, bounds) for file in named):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise WorkspaceError(f"{path}: damaged; remove it, and what it recorded is done again") from None
    return ledger


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Write the ledger, so that it is there whole or as before."""
    write_json(path, asdict(ledger))


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents
