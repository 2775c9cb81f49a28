"""Removal of files that a run can make again and its release does not need."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipeline.workflow.stages.calibrate import DISTILLED, FOLDER
from pipeline.workflow.workspace import Workspace

# Exact names of our own interrupted writes, because people's files may have similar names.
LEFT_BEHIND = re.compile(
    r"(adapter|trained|untrained-\w+|base|merged-(nf4|bf16)|shards|[\w-]+\.(json|yaml|md|png))\.partial"
    r"|(adapter|trained|base)\.old"
)


def clean(workspace: Workspace) -> tuple[int, list[str]]:
    """Remove checkpoints, unpacked base models, files of interrupted stages, and calibrations that are used up.

    Outputs of finished steps stay, except a calibration when all its variants are measured. A base model is fetched
    again if a later step needs it, and a variant that is added later is calibrated again.

    Returns:
        Freed bytes, and the names of the removed files and folders.

    Raises:
        WorkspaceError: if a run is working in the folder.
    """
    freed, removed = 0, []
    with workspace.lock():
        places = [workspace.base, workspace.checkpoints, *workspace.quantized.glob("*")]
        if all(f"quantize/{name}" in workspace.ledger() for name in workspace.config().quantize.calibrated):
            places += [workspace.folder / FOLDER, workspace.folder / DISTILLED]
        for folder in {workspace.folder, workspace.release}:
            places += [path for path in folder.iterdir() if LEFT_BEHIND.fullmatch(path.name)]
        for place in places:
            if place.exists():
                freed += _size(place)
                removed.append(place.name)
                shutil.rmtree(place) if place.is_dir() else place.unlink()
    return freed, removed


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if not f.is_dir())
