"""`tunepress.json`: where every byte of a release came from."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config import REPO_ID, Config
from pipeline.files import sha256
from pipeline.libraries import versions
from pipeline.workspace import Workspace

SCHEMA = 1


def lineage(
    config: Config,
    workspace: Workspace,
    results: dict,
    files: Mapping[str, Path],
    documents: Collection[str],
    mirror_of: str | None = None,
) -> bytes:
    """The lineage of a release as JSON.

    Args:
        results: the figures of the models in this release, as `results.json` has them.
        files: what the release consists of besides its documents: path in it -> local file.
        documents: paths of the documents beside this one, which hold the same figures for people.
        mirror_of: the repository whose variant stands here at the root.
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

    content = {
        "schema": SCHEMA,
        "made_with": {"tunepress": own_version(), **versions()},
        "run": config.name,
        **({"mirror_of": mirror_of} if mirror_of else {}),
        "base": results.get("origin", {}),
        **({"adapter": results["adapter"]} if "adapter" in results else {}),
        **({"data": _data(config, results)} if config.data else {}),
        "configuration": json.loads(config.model_dump_json()),
        **({"merged_into": results["merge"].get("base")} if "merge" in results else {}),
        "files": {name: digest(path) for name, path in sorted(files.items())},
        "documents": sorted(documents),
        "results": results,
    }
    return (json.dumps(_portable(content, _sources(config)), indent=2, ensure_ascii=False) + "\n").encode()


def _data(config: Config, results: dict) -> dict:
    """Which data was trained on: what was asked for, and over it what was found."""
    asked = config.data.model_dump(include={"source", "subset", "revision", "split", "form"})
    found = {k: results.get("data", {}).get(k) for k in (*asked, "fingerprint", "license")}
    return {**asked, **{k: v for k, v in found.items() if v is not None}}


def _sources(config: Config) -> set[str]:
    """What the configuration names that may lie on this machine."""
    named = (
        config.model.source,
        config.data and config.data.source,
        config.evaluate and config.evaluate.general,
        config.merge.adapter,
    )
    return {source for source in named if source}


def _portable(content: Any, sources: Collection[str]) -> Any:
    """`content` with the names of local files and folders instead of their paths on this machine."""
    if isinstance(content, dict):
        return {key: _portable(value, sources) for key, value in content.items()}
    if isinstance(content, list):
        return [_portable(value, sources) for value in content]
    if not isinstance(content, str) or content not in sources or content.startswith(("package:", "builtin:")):
        return content
    path = Path(content).expanduser()
    on_hub = REPO_ID.match(content) and not path.exists()
    return content if on_hub else path.resolve().name


def own_version() -> str:
    """The installed version of tunepress; "source" where it runs from a clone that is not installed."""
    try:
        return version("tunepress")
    except PackageNotFoundError:
        return "source"
