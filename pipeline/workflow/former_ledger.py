"""Ledgers of version 0.1: finished steps only, with other files beside the ledger for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.system.files import read_json

_KINDS = {"": "written", "measured": "measured", "tried": "tried", "sensitivity": "layers"}  # NAME.KIND.json


def converted(steps: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a former ledger in the present form.

    Args:
        steps: the finished steps by key, as the former ledger has them.
        folder: folder of the run, with the files beside the ledger.
    """
    steps, base = {**steps}, read_json(folder / "base.json", {})
    if base:
        base["bytes"] = read_json(folder / "quantized" / "passed.json", {}).get("bytes")
    for path, name, kind in _of_variants(folder):
        entry = steps.setdefault(f"quantize/{name}", {"outputs": {}, "state": "running"})
        entry.setdefault("progress", {})[_KINDS[kind]] = read_json(path, {})
    return {"steps": steps, "inputs": read_json(folder / "inputs.json", {}), "base": base or None}


def side_files(folder: Path) -> list[Path]:
    """Return the files beside a former ledger, which are not needed after it is converted."""
    named = [folder / name for name in ("base.json", "inputs.json", "live.json", "quantized/passed.json")]
    return [path for path in (*named, *(path for path, *_ in _of_variants(folder))) if path.is_file()]


def _of_variants(folder: Path) -> list[tuple[Path, str, str]]:
    """Return the side files of variants: path, name of the variant, kind."""
    found = [(path, *path.stem.partition(".")[::2]) for path in (folder / "quantized").glob("*.json")]
    return [(path, name, kind) for path, name, kind in found if kind in _KINDS and name != "passed"]
