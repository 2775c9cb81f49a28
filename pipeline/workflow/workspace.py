"""Folder of a run: its parts, its ledger and its figures.

runs/<name>/
  config.yaml      the configuration
  ledger.json      the steps, what they depend on, and the progress of stopped steps
  events.jsonl     the events, in order
  results.json     the figures, the only source of a card's numbers
  base/ data/ checkpoints/ adapter/ (or trained/) quantized/ measurements/ logs/
  release/         the result: the files of the repository

If `--output` names the folder of the result, all other files lie in its subfolder `.tunepress/`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config.loader import dump_config, load_config
from pipeline.config.schema import Config
from pipeline.errors import WorkspaceError
from pipeline.system.files import Digest, place_files, read_json, sync, write_json, write_text
from pipeline.system.redaction import without_private
from pipeline.workflow import former_ledger
from pipeline.workflow.folder_lock import is_locked, locked
from pipeline.workflow.ledger import Entry, Ledger, read_ledger, write_ledger

__all__ = ["HIDDEN", "Entry", "Workspace"]

HIDDEN = ".tunepress"  # the run's folder inside the folder that `--output` names


class Workspace:
    """The folder of a run. The object has no state of its own: all state is in the files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config_path = self.folder / "config.yaml"
        self.ledger_path = self.folder / "ledger.json"
        self.events_path = self.folder / "events.jsonl"
        self.results_path = self.folder / "results.json"
        self.base = self.folder / "base"
        self.data = self.folder / "data"
        self.checkpoints = self.folder / "checkpoints"
        self.adapter = self.folder / "adapter"
        self.trained = self.folder / "trained"  # all weights of the model, if no adapter is trained
        self.quantized = self.folder / "quantized"
        self.measurements = self.folder / "measurements"
        self.logs = self.folder / "logs"
        self.release = self.folder.parent if self.folder.name == HIDDEN else self.folder / "release"

    @property
    def _bounds(self) -> Path:
        """The folder that contains all files of the run."""
        return self.release if self.folder.name == HIDDEN else self.folder

    def log_of(self, stage: str, variants: Iterable[str] = (), rank: int = 0) -> Path:
        """Return the file for the output of a stage's process with this rank."""
        name = "-".join((stage, *variants))
        return self.logs / f"{name}.{rank}.log" if rank else self.logs / f"{name}.log"

    @classmethod
    @contextmanager
    def claim(cls, folder: str | Path, config: Config, fresh: bool = False) -> Iterator[Workspace]:
        """Lock the folder of a run for this process, write the configuration into it, and yield it.

        Args:
            fresh: remove the files of an earlier run.

        Raises:
            WorkspaceError: if another process uses the folder, or it cannot be written.
        """
        workspace = cls(folder)
        with workspace.lock():
            workspace._prepare(config, fresh)
            yield workspace

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes out of the run's folder, as `folder_lock.locked` does."""
        return locked(self._lock_path, self.folder)

    def is_in_use(self) -> bool:
        """Return True if another process works in the run's folder."""
        return is_locked(self._lock_path)

    @property
    def _lock_path(self) -> Path:
        hidden = self.folder.name == HIDDEN
        return self.folder / "lock" if hidden else self.folder.parent / f".{self.folder.name}.lock"

    def _prepare(self, config: Config, fresh: bool) -> None:
        if fresh and self.folder.is_dir():
            self._empty()
        if self.folder.exists() and not self.folder.is_dir():
            raise WorkspaceError(f"{self.folder}: is a file, not the folder of a run. Try: another name or --runs")
        try:
            self.folder.mkdir(exist_ok=True)
            write_text(self.config_path, dump_config(config))
            self._forget(config)
        except OSError as error:
            raise WorkspaceError(f"{self.folder}: cannot be written ({error.strerror})") from None

    def _empty(self) -> None:
        """Remove the files of an earlier run, except its configuration, which marks the folder as a run's."""
        others = [path for path in self.folder.iterdir() if not path.name.startswith(self.config_path.name)]
        if others and not self.config_path.is_file():
            raise WorkspaceError(f"{self.folder}: not the folder of a run, so --fresh does not empty it")
        for path in others:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _forget(self, config: Config) -> None:
        """Remove figures that this configuration does not ask for, an old comparison, and side files."""
        former = former_ledger.side_files(self.folder)
        if former or self.read_ledger().comparison:  # the comparison of a stopped retraining must not bind other runs
            self.update(lambda ledger: replace(ledger, comparison=None))
        for path in former:
            path.unlink()
        asked: dict[str, object] = {
            "data": config.data,
            "training": config.data,
            "adapter": config.merge.adapter,
            "merge": config.merges,
        }
        asked["retraining"] = config.data
        measured = config.evaluate is not None
        asked |= {"base": measured, "merged": measured and config.merges}
        for name in (name for name, wanted in asked.items() if not wanted):
            (self.measurements / f"{name}.json").unlink(missing_ok=True)

    @classmethod
    def open(cls, folder: str | Path) -> Workspace:
        """Return an existing run, by its own folder or the folder of its result.

        Raises:
            WorkspaceError: if the folder contains no run.
        """
        for workspace in (cls(folder), cls(Path(folder) / HIDDEN)):
            with suppress(OSError):  # a name too long for a folder
                if workspace.config_path.is_file():
                    return workspace
        raise WorkspaceError(f"{folder}: not the folder of a run (no config.yaml)")

    def config(self) -> Config:
        """Return the configuration of the last run."""
        return load_config(self.config_path)

    def read_ledger(self) -> Ledger:
        """Return the whole ledger.

        Raises:
            WorkspaceError: if it is damaged.
        """
        return read_ledger(self.ledger_path, self._bounds)

    def ledger(self) -> dict[str, Entry]:
        """Return the finished steps by key, such as `train` or `quantize/int4`."""
        return self.read_ledger().done()

    def update(self, change: Callable[[Ledger], Ledger]) -> None:
        """Apply `change` to the ledger, locked against changes by other processes."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            write_ledger(self.ledger_path, change(self.read_ledger()))
        finally:
            os.close(folder)

    def record(self, key: str, entry: Entry) -> None:
        """Record a finished step, and keep its progress."""
        self.update(lambda ledger: ledger.with_entry(key, replace(entry, progress=_entry(ledger, key).progress)))

    def undo(self, key: str) -> None:
        """Remove a step from the ledger so that it is done again; its files stay until then."""
        self.update(lambda ledger: ledger.without(key))

    def note(self, key: str, **progress: object) -> None:
        """Record progress of a step by name, which lets it go on after a stop; None removes an entry."""

        def noted(ledger: Ledger) -> Ledger:
            entry = _entry(ledger, key)
            kept = {name: value for name, value in {**entry.progress, **progress}.items() if value is not None}
            return ledger.with_entry(key, replace(entry, progress=kept))

        self.update(noted)

    def progress(self, key: str, name: str) -> dict:
        """Return the progress that `note` recorded; {} if there is none."""
        return _entry(self.read_ledger(), key).progress.get(name, {})

    def holds(self, key: str, fingerprint: str) -> bool:
        """Return True if the step finished with the same dependencies and its outputs are unchanged."""
        entry = self.ledger().get(key)
        if entry is None or entry.fingerprint != fingerprint:
            return False
        return all(digest.holds(self.folder / path) for path, digest in entry.outputs.items())

    def state_of(self, *keys: str) -> dict:
        """Return the output hashes of these steps, which later steps depend on; figures vary, so they are left out."""
        ledger = self.ledger()
        return {
            key: {p: d.sha256 for p, d in ledger[key].outputs.items() if not p.startswith("measurements/")}
            for key in keys
            if key in ledger
        }

    def digests(self, paths: Iterable[Path]) -> dict[str, Digest]:
        """Return the digests of files, and of all files in folders, by path in the run's folder.

        The files are flushed to the disk first, so that they survive a power failure.
        """
        files = sorted(f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
        for path in {*files, *(file.parent for file in files)}:
            sync(path)
        return {Path(os.path.relpath(f, self.folder)).as_posix(): Digest.of(f) for f in files}

    def place(self, partial: Path, folder: Path, key: str) -> list[Path]:
        """Move the finished files of a step into the release, and leave people's files there.

        Earlier files of the step are removed, and weights that a library would load instead.

        Returns:
            The new paths.
        """
        made = {folder / path.relative_to(partial) for path in partial.rglob("*") if path.is_file()}
        place_files(partial, folder)
        stale = self._outputs(key) - self._outputs(*(self.ledger().keys() - {key}))  # variants share license files
        if any(path.suffix == ".safetensors" for path in made):
            stale |= set(folder.glob("*.safetensors*"))
        for path in stale - made:
            if folder in path.parents:
                path.unlink(missing_ok=True)
        return sorted(made)

    def placed(self, key: str) -> list[Path]:
        """Return the files of a step that are still in the release."""
        made = (path for path in self._outputs(key) if self.release in path.parents)
        return sorted(path for path in made if path.parent != self.measurements and path.is_file())

    def take_back(self, key: str, placed_in: Path, folder: Path) -> None:
        """Move the files of a step out of the release into `folder`; copy those that another step has too."""
        others = self._outputs(*(self.ledger().keys() - {key}))
        for path in self.placed(key):
            to = folder / path.relative_to(placed_in)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to) if path in others else os.replace(path, to)

    def remove(self, key: str, stay: Iterable[str]) -> None:
        """Remove the files of a step from the release, except those that a step in `stay` has too."""
        for path in self._outputs(key) - self._outputs(*stay):
            path.unlink(missing_ok=True)

    def _outputs(self, *keys: str) -> set[Path]:
        ledger = self.ledger()
        made = (path for key in keys if key in ledger for path in ledger[key].outputs)
        return {Path(os.path.normpath(self.folder / path)) for path in made}

    def write_measurement(self, name: str, content: dict) -> Path:
        """Store the figures of one step, and write `results.json`."""
        path = self.measurements / f"{name}.json"
        write_json(path, without_private(content, self._bounds))
        self.assemble_results()
        return path

    def drop_measurement(self, name: str) -> None:
        """Remove the figures of a model that no longer exists."""
        (self.measurements / f"{name}.json").unlink(missing_ok=True)
        self.assemble_results()

    def read_measurement(self, name: str) -> dict:
        """Return the figures of one step; {} if there are none."""
        return read_json(self.measurements / f"{name}.json", {})

    def assemble_results(self) -> None:
        """Write `results.json` from the measurements."""
        order = {name: i for i, name in enumerate(("origin", "data", "training", "adapter", "merge", "base", "merged"))}
        files = sorted(self.measurements.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        write_json(self.results_path, {p.stem: read_json(p, {}) for p in files})


def _entry(ledger: Ledger, key: str) -> Entry:
    return ledger.steps.get(key, Entry(state="running"))
