"""Remove from a run's folder what neither its release nor another run of it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.workspace import Workspace


def clean(workspace: Workspace) -> tuple[int, list[str]]:
    """Remove checkpoints, unpacked base models, and what interrupted stages left.

    Everything that is recorded as finished stays, so the run still holds; a base model that is
    needed again is fetched again.

    Returns:
        Bytes that were freed, and what was removed.

    Raises:
        WorkspaceError: where a run is working in the folder.
    """
    freed, removed = 0, []
    with workspace.lock():
        places = [workspace.base, workspace.checkpoints, workspace.quantized]
        for folder in {workspace.folder, workspace.release}:
            places += [*folder.glob("*.partial"), *folder.glob("*.old-*")]
        for place in places:
            if place.exists():
                freed += _size(place)
                removed.append(place.name)
                shutil.rmtree(place) if place.is_dir() else place.unlink()
    return freed, removed


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if not f.is_dir())
