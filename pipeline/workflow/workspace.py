"""A run's folder: its parts, its ledger and its figures.

runs/<name>/
  config.yaml      what this run was asked for
  ledger.json      what is done, on what it depends, and what a stopped stage needs to go on
  events.jsonl     everything that happened, in order
  results.json     the figures, the only source of a card's numbers
  base/ data/ checkpoints/ adapter/ quantized/ measurements/ logs/
  release/         the result: the tree of the repository

If the result was asked for in a folder of its own, the rest lies in that folder's `.tunepress/`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config.loader import dump_config, load_config
from pipeline.config.schema import Config
from pipeline.errors import WorkspaceError
from pipeline.system.files import Digest, place_files, read_json, sync, write_json, write_text
from pipeline.system.redaction import without_private
from pipeline.workflow import former_ledger
from pipeline.workflow.ledger import Entry, Ledger, read_ledger, write_ledger

__all__ = ["HIDDEN", "Entry", "Workspace"]

HIDDEN = ".tunepress"  # the run's folder inside a result that was asked for by name


class Workspace:
    """A run's folder, by its parts. The object holds no state: all state is in the files."""

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
        self.quantized = self.folder / "quantized"
        self.measurements = self.folder / "measurements"
        self.logs = self.folder / "logs"
        self.release = self.folder.parent if self.folder.name == HIDDEN else self.folder / "release"

    @property
    def _bounds(self) -> Path:
        """The folder with everything of the run: its own, or that of its result if it lies in there."""
        return self.release if self.folder.name == HIDDEN else self.folder

    def log_of(self, stage: str, variants: Iterable[str] = (), rank: int = 0) -> Path:
        """Return the file for the output of a stage's process; `rank` tells the processes of one training apart."""
        name = "-".join((stage, *variants))
        return self.logs / f"{name}.{rank}.log" if rank else self.logs / f"{name}.log"

    @classmethod
    @contextmanager
    def claim(cls, folder: str | Path, config: Config, fresh: bool = False) -> Iterator[Workspace]:
        """Yield the folder of `config`'s run, locked for this process, with the configuration written into it.

        Args:
            fresh: remove what an earlier run left there.

        Raises:
            WorkspaceError: if another process works on it, or the folder cannot be written.
        """
        workspace = cls(folder)
        with workspace.lock():
            workspace._prepare(config, fresh)
            yield workspace

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the run's folder.

        Raises:
            WorkspaceError: if another process works on it, or the folder cannot be written.
        """
        from filelock import FileLock, Timeout

        root = self.folder.parent
        hidden = self.folder.name == HIDDEN
        lock = FileLock(self.folder / "lock" if hidden else root / f".{self.folder.name}.lock")
        try:
            (self.folder if hidden else root).mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise WorkspaceError(f"{self.folder}: another tunepress is working on this run; wait for it") from None
        except OSError as error:
            raise WorkspaceError(f"{root}: runs cannot be written there ({error.strerror})") from None
        with lock:
            lock.release()  # `with` has taken it a second time
            yield

    def _prepare(self, config: Config, fresh: bool) -> None:
        if fresh and self.folder.is_dir():
            self._empty()
        if self.folder.exists() and not self.folder.is_dir():
            raise WorkspaceError(f"{self.folder}: a file is in the way of the run's folder")
        try:
            self.folder.mkdir(exist_ok=True)
            write_text(self.config_path, dump_config(config))
            self._forget(config)
        except OSError as error:
            raise WorkspaceError(f"{self.folder}: cannot be written ({error.strerror})") from None

    def _empty(self) -> None:
        """Remove what an earlier run left, except its configuration, which marks the folder as a run's."""
        others = [path for path in self.folder.iterdir() if not path.name.startswith(self.config_path.name)]
        if others and not self.config_path.is_file():
            raise WorkspaceError(f"{self.folder}: not a run's folder, so --fresh does not remove it")
        for path in others:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _forget(self, config: Config) -> None:
        """Remove figures that this configuration does not ask for, what the run was compared with, and former files."""
        former = former_ledger.side_files(self.folder)
        if former or self.read_ledger().comparison:  # a retraining that was stopped binds only retrainings
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
        """Return an existing run, by its own folder or by that of its result.

        Raises:
            WorkspaceError: if there is none.
        """
        for workspace in (cls(folder), cls(Path(folder) / HIDDEN)):
            with suppress(OSError):  # a name too long for a folder
                if workspace.config_path.is_file():
                    return workspace
        raise WorkspaceError(f"{folder}: not a run's folder; it has no config.yaml")

    def config(self) -> Config:
        """Return the configuration that the run was last asked for."""
        return load_config(self.config_path)

    def read_ledger(self) -> Ledger:
        """Return all that the ledger has.

        Raises:
            WorkspaceError: if it is damaged.
        """
        return read_ledger(self.ledger_path, self._bounds)

    def ledger(self) -> dict[str, Entry]:
        """Return the finished steps by key, such as `train` or `quantize/int4`."""
        return self.read_ledger().done()

    def update(self, change: Callable[[Ledger], Ledger]) -> None:
        """Replace the ledger by what `change` makes of it; what other processes change meanwhile is not lost."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            write_ledger(self.ledger_path, change(self.read_ledger()))
        finally:
            os.close(folder)

    def record(self, key: str, entry: Entry) -> None:
        """Record a finished step; its progress stays."""
        self.update(lambda ledger: ledger.with_entry(key, replace(entry, progress=_entry(ledger, key).progress)))

    def undo(self, key: str) -> None:
        """Have a step done again; what it made stays until then."""
        self.update(lambda ledger: ledger.without(key))

    def note(self, key: str, **progress: object) -> None:
        """Record what a step needs to go on when it is stopped; None removes what was recorded by that name."""

        def noted(ledger: Ledger) -> Ledger:
            entry = _entry(ledger, key)
            kept = {name: value for name, value in {**entry.progress, **progress}.items() if value is not None}
            return ledger.with_entry(key, replace(entry, progress=kept))

        self.update(noted)

    def progress(self, key: str, name: str) -> dict:
        """Return what `note` recorded; {} if there is nothing."""
        return _entry(self.read_ledger(), key).progress.get(name, {})

    def holds(self, key: str, fingerprint: str) -> bool:
        """Return True if the step is finished, for the same dependencies, with its outputs as it left them."""
        entry = self.ledger().get(key)
        if entry is None or entry.fingerprint != fingerprint:
            return False
        return all(digest.holds(self.folder / path) for path, digest in entry.outputs.items())

    def state_of(self, *keys: str) -> dict:
        """Return what later steps depend on: the steps' outputs by hash, without figures, which vary."""
        ledger = self.ledger()
        return {
            key: {p: d.sha256 for p, d in ledger[key].outputs.items() if not p.startswith("measurements/")}
            for key in keys
            if key in ledger
        }

    def digests(self, paths: Iterable[Path]) -> dict[str, Digest]:
        """Return the digests of files, and of all files in folders, by path in the run's folder.

        The files are on the disk when this returns, also after a power cut.
        """
        files = sorted(f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
        for path in {*files, *(file.parent for file in files)}:
            sync(path)
        return {Path(os.path.relpath(f, self.folder)).as_posix(): Digest.of(f) for f in files}

    def place(self, partial: Path, folder: Path, key: str) -> list[Path]:
        """Move a step's finished files into the release, beside files that people may have put there.

        Files that the step had made before are removed, and weights that a library would load instead.

        Returns:
            The files in their new place.
        """
        made = {folder / path.relative_to(partial) for path in partial.rglob("*") if path.is_file()}
        place_files(partial, folder)
        stale = self._outputs(key) - self._outputs(*(self.ledger().keys() - {key}))  # variants share terms of use
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
        """Move the files of a step out of the release into `folder`; files of another step too are copied."""
        others = self._outputs(*(self.ledger().keys() - {key}))
        for path in self.placed(key):
            to = folder / path.relative_to(placed_in)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to) if path in others else os.replace(path, to)

    def remove(self, key: str, stay: Iterable[str]) -> None:
        """Remove the files of a step from the release, except those that one of the steps `stay` has made too."""
        for path in self._outputs(key) - self._outputs(*stay):
            path.unlink(missing_ok=True)

    def _outputs(self, *keys: str) -> set[Path]:
        ledger = self.ledger()
        made = (path for key in keys if key in ledger for path in ledger[key].outputs)
        return {Path(os.path.normpath(self.folder / path)) for path in made}

    def write_measurement(self, name: str, content: dict) -> Path:
        """Store one step's figures, and write `results.json` again."""
        path = self.measurements / f"{name}.json"
        write_json(path, without_private(content, self._bounds))
        self.assemble_results()
        return path

    def drop_measurement(self, name: str) -> None:
        """Remove figures of a model that is no longer there."""
        (self.measurements / f"{name}.json").unlink(missing_ok=True)
        self.assemble_results()

    def read_measurement(self, name: str) -> dict:
        """Return one step's figures; {} if there are none."""
        return read_json(self.measurements / f"{name}.json", {})

    def assemble_results(self) -> None:
        """Write `results.json` from the measurements; a model that was not measured is not in it."""
        order = {name: i for i, name in enumerate(("origin", "data", "training", "adapter", "merge", "base", "merged"))}
        files = sorted(self.measurements.glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        write_json(self.results_path, {p.stem: read_json(p, {}) for p in files})


def _entry(ledger: Ledger, key: str) -> Entry:
    return ledger.steps.get(key, Entry(state="running"))
