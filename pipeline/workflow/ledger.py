"""`ledger.json`: the steps of a run, what each depends on, and the progress of stopped steps.

Only the ledger says which steps are finished. The entry of a step names its output files, with their sha256.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pipeline.errors import WorkspaceError
from pipeline.publishing.removal import Removal
from pipeline.system.files import Digest, read_json, write_json
from pipeline.workflow.former_ledger import converted


@dataclass(frozen=True)
class Entry:
    """One step: a stage, or a stage for one variant.

    Attributes:
        fingerprint: of all its dependencies when it last finished.
        outputs: digests of its output files by their path in the run's folder.
        summary: its figures, as plain data.
        finished: seconds since the epoch.
        seconds: duration.
        progress: state that lets a stopped step go on, and results to reuse, as plain data.
        state: "running" until the step finishes for the first time, even if it was stopped.
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
    """The base model on this machine.

    Attributes:
        model: the section `model` of the configuration that it was fetched for.
        folder: absolute path.
        revision: its commit on the Hub.
        bytes: size of its weights, if they were read shard by shard and not kept.
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
        inputs: digests of local input files, by their name in the configuration.
        base: the base model on this machine.
        comparison: the published model that a retraining compares with, until the run is published.
        removal: removals that were agreed and not published yet.
    """

    steps: dict[str, Entry] = field(default_factory=dict)
    inputs: dict[str, dict[str, Digest]] = field(default_factory=dict)
    base: BaseModel | None = None
    comparison: dict[str, Any] | None = None
    removal: Removal = Removal()

    def done(self) -> dict[str, Entry]:
        """Return the steps that have finished at least once."""
        return {key: entry for key, entry in self.steps.items() if entry.state == "done"}

    def with_entry(self, key: str, entry: Entry) -> Ledger:
        """Return the ledger with this entry added or replaced."""
        return replace(self, steps={**self.steps, key: entry})

    def without(self, key: str) -> Ledger:
        """Return the ledger without this step."""
        return replace(self, steps={k: entry for k, entry in self.steps.items() if k != key})


_LEDGER = TypeAdapter(Ledger)


def read_ledger(path: Path, bounds: Path) -> Ledger:
    """Return the ledger of a run; an empty one if the file does not exist.

    The files it names are published, moved and removed, so all of them must lie in the folder `bounds`.

    Raises:
        WorkspaceError: if it is damaged, or names a file outside `bounds`.
    """
    try:
        content = read_json(path, {})
        ledger = _LEDGER.validate_python(content if "steps" in content else converted(content, path.parent))
        named = (path.parent / name for entry in ledger.steps.values() for name in entry.outputs)
        if not all(_is_within(file, bounds) for file in named):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise WorkspaceError(f"{path}: damaged. Try: remove it; its steps are then done again") from None
    return ledger


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Write the ledger as a whole, or leave it unchanged."""
    write_json(path, asdict(ledger))


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents
