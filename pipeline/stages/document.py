"""Write the release's documents from its figures: cards, picture, lineage. No model is touched."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pipeline.catalog import VARIANTS
from pipeline.config import Config
from pipeline.events import Events
from pipeline.hub import LINEAGE, Content
from pipeline.stages import Outcome
from pipeline.workspace import Workspace, fingerprint, read_json, write_bytes

PICTURE = "assets/quality_vs_size.png"


def parameters(config: Config, variant: str | None) -> dict:
    return {}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    results = _results(workspace, variants)
    keys = ("train", "merge", *(f"quantize/{v}" for v in variants))
    return {
        "publish": config.publish.model_dump(),
        "variants": list(variants),
        "results": fingerprint(results),
        "after": workspace.state_of(*keys),
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    documents = render(config, workspace, variants)
    paths = write(workspace, documents, variants)
    return Outcome(tuple(paths), {"documents": len(paths)})


def release_files(workspace: Workspace, variants: tuple[str, ...]) -> dict[str, Path]:
    """The models of a release with these variants, as the ledger knows them: path in the repository -> local file."""
    ledger, prefix = workspace.ledger(), f"{workspace.release.name}/"
    made = (path for key in ("merge", *(f"quantize/{v}" for v in variants)) for path in ledger[key].outputs)
    return {p.removeprefix(prefix): workspace.folder / p for p in sorted(made) if p.startswith(prefix)}


def render(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict[str, bytes]:
    """The documents of a release that holds exactly these variants."""
    from pipeline.card import About, model_card, plot_quality, variant_card
    from pipeline.lineage import lineage

    results = _results(workspace, variants)
    location = config.publish.repo or workspace.release.as_posix()
    about = About(config.publish.repo or config.name, location, config, results)
    documents = {"README.md": model_card(about, variants).encode()}
    for variant in variants:
        documents[f"{variant}/README.md"] = variant_card(about, variant).encode()
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "picture.png"
        if plot_quality(about, variants, picture):
            documents[PICTURE] = picture.read_bytes()
    documents[LINEAGE] = lineage(config, workspace, results, release_files(workspace, variants), documents.keys())
    return documents


def write(workspace: Workspace, documents: dict[str, bytes], variants: tuple[str, ...]) -> list[Path]:
    """Put documents into `release/`, each whole, and take out variants that are no longer part of it."""
    for name in VARIANTS.keys() - set(variants):
        shutil.rmtree(workspace.release / name, ignore_errors=True)
        (workspace.measurements / f"{name}.json").unlink(missing_ok=True)
    workspace.assemble_results()
    paths = [workspace.release / name for name in documents]
    for path, content in zip(paths, documents.values(), strict=True):
        write_bytes(path, content)
    return paths


def contents(workspace: Workspace, variants: tuple[str, ...], documents: dict[str, bytes]) -> dict[str, Content]:
    """Everything of a release, models and documents."""
    return {**release_files(workspace, variants), **documents}


def _results(workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """The figures of what is in the release; those of other variants stay out of its card."""
    results = read_json(workspace.results_path, {})
    return {name: value for name, value in results.items() if name not in VARIANTS or name in variants}
