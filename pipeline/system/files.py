"""Files and folders of a run: hashes, and writing that a power cut leaves complete or undone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DiskFull, UserError, WorkspaceError

# How libraries that hide the system's error tell of a disk that is full.
_NO_ROOM = re.compile(
    r"No space left|os error 28|[Dd]isk is full|[Qq]uota exceeded|PytorchStreamWriter failed|inline_container"
)


@dataclass(frozen=True)
class Digest:
    """The hash of a file's content. `size` (bytes) and `mtime_ns` save hashing a file that did not change."""

    sha256: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Digest:
        """Return the digest of a file, which is read."""
        state = path.stat()
        return cls(sha256(path), state.st_size, state.st_mtime_ns)

    def holds(self, path: Path) -> bool:
        """Return True if a file is there and has this content; it is read only if its time is another."""
        try:
            state = path.stat()
        except OSError:
            return False
        if state.st_size != self.size:
            return False
        return state.st_mtime_ns == self.mtime_ns or sha256(path) == self.sha256


def no_room(error: BaseException | None, folder: str | Path = ".") -> DiskFull | None:
    """Return the error to show if `error` was caused by a full disk, else None.

    Args:
        folder: where it was being written, if the error does not say.
    """
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (not isinstance(error, UserError) and _NO_ROOM.search(str(error))):
            place = Path(getattr(error, "filename", None) or folder)
            there = next(p for p in (place, *place.absolute().parents) if p.exists())
            left = shutil.disk_usage(there).free
            return DiskFull(f"{place}: the disk is full, {left:,} bytes are left; make room, and run it again")
        error = error.__cause__ or error.__context__
    return None


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def states(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return size (bytes) and modification time (ns) by file name, to detect changes without reading the files."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def fingerprint(content: object) -> str:
    """Return a short digest of plain data, the same for the same data."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_json(path: Path, default: dict) -> dict:
    """Return the plain data in a JSON file, or `default` if the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError:
        raise WorkspaceError(f"{path}: damaged. Try: remove it; its steps are then done again") from None


def write_json(path: Path, content: object) -> None:
    """Write plain data as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: after a power cut it is complete, or as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        error.filename = error.filename or str(path)  # a write that fails does not say where
        raise
    sync(path.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a complete folder in its place; remove the old folder only after that."""
    sync_all(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed before it could
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def place_files(partial: Path, folder: Path) -> None:
    """Move the content of a complete folder into a folder that holds other things too; `config.json` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
        if path.is_dir():
            place_files(path, folder / path.name)
        else:
            sync(path)
            os.replace(path, folder / path.name)
    partial.rmdir()
    sync(folder)


def empty_folder(folder: Path) -> Path:
    """Make `folder`, or empty it, and return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def sync_all(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
