"""`tunepress.json`: where every byte of a release came from."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.libraries import versions
from pipeline.workspace import Workspace, sha256

SCHEMA = 1


def lineage(
    config: Config, workspace: Workspace, results: dict, files: Mapping[str, Path], documents: Collection[str]
) -> bytes:
    """The lineage of a release as JSON.

    Args:
        results: the figures of the models in this release, as `results.json` has them.
        files: what the release consists of besides its documents: path in it -> local file.
        documents: paths of the documents beside this one, which hold the same figures for people.
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
        "documents": sorted(documents),
        "results": results,
    }
    sources = (config.model.source, config.data.source, config.evaluate.general)
    return (json.dumps(_portable(content, sources), indent=2, ensure_ascii=False) + "\n").encode()


def _portable(content: Any, sources: Collection[str]) -> Any:
    """`content` with the names of local files and folders instead of their paths on this machine."""
    if isinstance(content, dict):
        return {key: _portable(value, sources) for key, value in content.items()}
    if isinstance(content, list):
        return [_portable(value, sources) for value in content]
    if not isinstance(content, str) or content not in sources or content.startswith(("package:", "builtin:")):
        return content
    path = Path(content).expanduser()
    return path.resolve().name if path.exists() else content


def own_version() -> str:
    """The installed version of tunepress; "source" where it runs from a clone that is not installed."""
    try:
        return version("tunepress")
    except PackageNotFoundError:
        return "source"
