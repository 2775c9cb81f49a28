"""Files and folders of ours: hashed, and written so that they are there whole, or as before, also after a power cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import WorkspaceError


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def states(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of the last change of files, by name: tells without reading them that they are as they were."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def fingerprint(content: object) -> str:
    """A short digest of plain data, the same for the same data."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_json(path: Path, default: dict) -> dict:
    """Plain data from a file of ours; `default` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError:
        raise WorkspaceError(f"{path}: damaged; remove it, and what it recorded is done again") from None


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as before, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a finished folder in its place; the old one is removed only when the new one is complete."""
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old-{time.time_ns()}")
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    _sync_folder(folder.parent)


def place_files(partial: Path, folder: Path) -> None:
    """Move what a finished folder holds into one that holds other things too; `config.json` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
        if path.is_dir():
            place_files(path, folder / path.name)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
    partial.rmdir()
    _sync_folder(folder)


def empty_folder(folder: Path) -> Path:
    """`folder`, there and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
