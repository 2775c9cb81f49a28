"""`tunepress.json`: where every byte of a release came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.config import Config
from pipeline.libraries import versions
from pipeline.workspace import Workspace, sha256

SCHEMA = 1


def lineage(config: Config, workspace: Workspace, results: dict, files: Mapping[str, Path]) -> bytes:
    """The lineage of a release as JSON.

    Args:
        results: the figures of the models in this release, as `results.json` has them.
        files: what the release consists of besides its documents: path in it -> local file.
    """
    known = {
        (workspace.folder / path).resolve(): digest
        for entry in workspace.ledger().values()
        for path, digest in entry.outputs.items()
    }

    def digest(path: Path) -> dict:
        state, entry = path.stat(), known.get(path.resolve())
        if entry and (entry.size, entry.mtime_ns) == (state.st_size, state.st_mtime_ns):
            return {"sha256": entry.sha256, "size": entry.size}
        return {"sha256": sha256(path), "size": state.st_size}

    training = results.get("training", {})
    content = {
        "schema": SCHEMA,
        "made_with": {"tunepress": own_version(), **versions()},
        "run": config.name,
        "base": training.get("base", {}),
        "data": {k: results.get("data", {}).get(k) for k in ("source", "form", "fingerprint", "license")},
        "configuration": json.loads(config.model_dump_json()),
        "merged_into": results.get("merge", {}).get("base"),
        "files": {name: digest(path) for name, path in sorted(files.items())},
        "results": results,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def own_version() -> str:
    """The installed version of tunepress; "source" where it runs from a clone that is not installed."""
    try:
        return version("tunepress")
    except PackageNotFoundError:
        return "source"
