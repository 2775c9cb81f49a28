"""Folders shipped with the code, `configs` and `templates`, in a clone and in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def shipped_folder(name: str) -> Path:
    """Return the folder `name`: beside the package in a clone, inside it in an installation."""
    package = Path(__file__).resolve().parents[1]
    return next((f for f in (package / name, package.parent / name) if f.is_dir()), package / name)
