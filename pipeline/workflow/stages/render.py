"""Stage `render`: the documents of a release (cards, picture, lineage), made from its figures without a model."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.catalog import VARIANTS, is_one_file
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.evaluation.results import Results
from pipeline.hub.tree import CARD, LINEAGE, LocalFile
from pipeline.models.gguf_metadata import read_dialogue
from pipeline.system.files import fingerprint, write_bytes
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome
from pipeline.workflow.stages.measure_variant import is_withheld
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.publishing.cards import About

PICTURE = "assets/quality_vs_size.png"
ADAPTER_CARD = f"adapter/{CARD}"

Existing = Callable[[str], bytes | None]  # path -> what is there now, in which people may have written


def parameters(config: Config, variant: str | None) -> dict:
    """Return the fields of the start event."""
    return {}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    """Return the dependencies as plain data."""
    results = _results(workspace, variants, withheld(config, workspace))
    keys = ("train", "merge", *(f"quantize/{v}" for v in variants))
    return {
        "publish": config.publish.model_dump(),
        "variants": list(variants),
        "results": fingerprint(results.to_json()),
        "after": workspace.state_of(*keys),
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Write the documents into the local release."""
    documents = render(config, workspace, variants, lambda path: local(workspace, path))
    if notice := license_notice(config, workspace):
        events.show(notice)
    for path, copy in set_aside(workspace, documents).items():
        events.show([f"{path}: rewritten; your changed text is in {copy}"])
    gone = [name for name in VARIANTS if name not in variants and workspace.placed(f"quantize/{name}")]
    paths = write(config, workspace, documents, variants)
    return Outcome(tuple(paths), {"documents": len(paths), **({"removed": ", ".join(gone)} if gone else {})})


def license_notice(config: Config, workspace: Workspace) -> list[str]:
    """Return a line for people if the configuration names another license than the base model; else nothing."""
    about = _about(config, workspace, ())
    if not about.license_conflict:
        return []
    chosen, of_base = config.publish.license, about.results.origin.license
    return [
        f"publish.license: {chosen}, while the base model names {of_base}, whose terms still apply; the card says so"
    ]


def withheld(config: Config, workspace: Workspace) -> tuple[str, ...]:
    """Return the measured variants that missed their gate and are not released."""
    return tuple(spec.name for spec in config.quantize.variants if is_withheld(config, workspace, spec.name))


def release_files(workspace: Workspace, variants: tuple[str, ...]) -> dict[str, LocalFile]:
    """Return the model files of a release with these variants by path; changed files are hashed again."""
    ledger = workspace.ledger()
    prefix = Path(os.path.relpath(workspace.release, workspace.folder)).as_posix() + "/"
    steps = [ledger[key] for key in ("merge", *(f"quantize/{v}" for v in variants)) if key in ledger]
    made = {path: digest for step in steps for path, digest in step.outputs.items() if path.startswith(prefix)}
    return {path.removeprefix(prefix): LocalFile.of(workspace.folder / path, made[path]) for path in sorted(made)}


def render(
    config: Config,
    workspace: Workspace,
    variants: tuple[str, ...],
    existing: Existing,
    mirrors: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Return the documents of a release that holds exactly these variants.

    Args:
        existing: the present documents; text of people in a README.md stays.
        mirrors: variant -> the repository that has it at its root.
    """
    from pipeline.publishing.cards import adapter_card, folder_card, model_card, plot_quality
    from pipeline.publishing.cards.readmes import merged
    from pipeline.publishing.lineage import lineage
    from pipeline.publishing.ollama import MODELFILE, modelfile

    about = _about(config, workspace, variants, withheld(config, workspace), mirrors)
    by_folder = folders(variants)
    cards = {CARD: model_card(about, variants)}
    cards |= {f"{folder}/{CARD}": folder_card(about, those) for folder, those in by_folder.items()}
    if about.explains_adapter:
        cards[ADAPTER_CARD] = adapter_card(about)
    documents = {
        path: merged(card.encode(), existing(path), about.is_guest and path == CARD) for path, card in cards.items()
    }
    for folder, those in by_folder.items():
        if alone := only_files(workspace, those):
            documents[f"{folder}/{MODELFILE}"] = modelfile(alone).encode()
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "picture.png"
        if not about.is_guest and plot_quality(about, variants, picture):
            documents[PICTURE] = picture.read_bytes()
    files = release_files(workspace, variants)
    documents[LINEAGE] = lineage(config, about.results, files, documents.keys())
    return documents


def render_mirror(config: Config, workspace: Workspace, variant: str, existing: Existing) -> dict[str, bytes]:
    """Return the documents of the repository that has one variant at its root."""
    from pipeline.publishing.cards import mirror_card
    from pipeline.publishing.cards.readmes import merged
    from pipeline.publishing.lineage import lineage
    from pipeline.publishing.ollama import MODELFILE, modelfile

    about, repo = _about(config, workspace, (variant,)), config.publish.mirrors[variant]
    documents = {CARD: merged(mirror_card(about, variant, repo).encode(), existing(CARD))}
    if alone := only_files(workspace, (variant,)):
        documents[MODELFILE] = modelfile(alone).encode()
    files, home = mirror_files(workspace, variant), config.publish.repo
    documents[LINEAGE] = lineage(config, about.results, files, documents.keys(), mirror_of=home)
    return documents


def mirror_files(workspace: Workspace, variant: str) -> dict[str, LocalFile]:
    """Return a variant's files by path in a repository of its own."""
    files, prefix = release_files(workspace, (variant,)).items(), f"{VARIANTS[variant].folder}/"
    return {path.removeprefix(prefix): file for path, file in files if path.startswith(prefix)}


def folders(variants: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the folders of these variants, with the variants in each."""
    found: dict[str, tuple[str, ...]] = {}
    for variant in variants:
        folder = VARIANTS[variant].folder
        found[folder] = (*found.get(folder, ()), variant)
    return found


def only_files(workspace: Workspace, variants: tuple[str, ...]) -> dict[str, Path]:
    """Return the file of each variant that is one file."""
    made = {variant: mirror_files(workspace, variant).values() for variant in variants if is_one_file(variant)}
    return {v: f.path for v, files in made.items() for f in files if f.path.suffix == VARIANTS[v].suffix}


def local(workspace: Workspace, path: str) -> bytes | None:
    """Return a document of the release's folder, or None."""
    file = workspace.release / path
    return file.read_bytes() if file.is_file() else None


def set_aside(workspace: Workspace, documents: Mapping[str, bytes]) -> dict[str, str]:
    """Copy local cards and Modelfiles with people's text that `documents` lack, before `write` replaces them.

    Returns:
        Path in the release -> path of the copy beside it, such as `README.md.local`.
    """
    from pipeline.publishing.ollama import MODELFILE

    aside = {}
    for path, document in documents.items():
        here, file = local(workspace, path), workspace.release / path
        if file.name not in (CARD, MODELFILE) or here is None or _is_as_written(workspace, path):
            continue
        if not _says_all_of(document, here, file.name):
            names = (file.with_name(f"{file.name}.local{n}") for n in itertools.chain([""], itertools.count(2)))
            copy = next(name for name in names if not name.exists())
            write_bytes(copy, here)
            aside[path] = copy.relative_to(workspace.release).as_posix()
    return aside


def _says_all_of(document: bytes, here: bytes, name: str) -> bool:
    """Return True if `document` contains all text of people in `here`. Only cards are merged."""
    from pipeline.publishing.cards.readmes import merged

    if name != CARD:
        return document == here
    try:
        return merged(document, here) == document
    except UserError:
        return False


def write(config: Config, workspace: Workspace, documents: dict[str, bytes], variants: tuple[str, ...]) -> list[Path]:
    """Write documents into the release, and remove variants that are no longer part of it."""
    kept_out = withheld(config, workspace)
    for name in VARIANTS.keys() - set(variants):
        _take_out(workspace, name, variants, keep_figures=name in kept_out)
    workspace.assemble_results()
    if PICTURE not in documents:  # the picture of old figures
        (workspace.release / PICTURE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or people's own pictures in it
            (workspace.release / PICTURE).parent.rmdir()
    if ADAPTER_CARD not in documents and _is_as_written(workspace, ADAPTER_CARD):
        (workspace.release / ADAPTER_CARD).unlink()
    paths = [workspace.release / name for name in documents]
    for path, content in zip(paths, documents.values(), strict=True):
        write_bytes(path, content)
    return paths


def withdraw(config: Config, workspace: Workspace) -> None:
    """Remove our documents from a release without a model."""
    write(config, workspace, {}, ())
    for path in (CARD, LINEAGE):
        if _is_as_written(workspace, path):
            (workspace.release / path).unlink()


def written_digests(workspace: Workspace, path: str, *steps: str) -> set[str]:
    """Return the sha256 of a document after each of these steps."""
    ledger = workspace.ledger()
    name = Path(os.path.relpath(workspace.release / path, workspace.folder)).as_posix()
    return {ledger[step].outputs[name].sha256 for step in steps if step in ledger and name in ledger[step].outputs}


def _is_as_written(workspace: Workspace, path: str) -> bool:
    """Return True if a document of the release's folder is unchanged since tunepress wrote it."""
    digest = hashlib.sha256(local(workspace, path) or b"").hexdigest()
    return digest in written_digests(workspace, path, "publish", "render")


def _take_out(workspace: Workspace, variant: str, stay: tuple[str, ...], keep_figures: bool) -> None:
    """Remove a variant from the release's folder, except files of another variant and files of people.

    Args:
        keep_figures: True for a withheld variant, of which only documents are in the release.
    """
    from pipeline.publishing.ollama import MODELFILE

    folder = VARIANTS[variant].folder
    if not keep_figures:
        (workspace.measurements / f"{variant}.json").unlink(missing_ok=True)
    if f"quantize/{variant}" not in workspace.ledger():
        return
    if not keep_figures:
        workspace.remove(f"quantize/{variant}", [f"quantize/{name}" for name in stay])
    if folder in folders(stay):
        return
    for document in (f"{folder}/{CARD}", f"{folder}/{MODELFILE}"):
        if _is_as_written(workspace, document):
            (workspace.release / document).unlink()
    with contextlib.suppress(OSError):  # not empty, or not there
        (workspace.release / folder).rmdir()


def _about(
    config: Config,
    workspace: Workspace,
    variants: tuple[str, ...],
    kept_out: tuple[str, ...] = (),
    mirrors: Mapping[str, str] | None = None,
) -> About:
    from pipeline.models.chat_templates import has_chat_template
    from pipeline.publishing.cards import About

    location = config.publish.repo or workspace.release.as_posix()
    files = only_files(workspace, variants)
    chats = any(has_chat_template(workspace.release / folder) for folder in ("", *folders(variants)))
    chats = chats or any(read_dialogue(file).template for file in files.values())
    results, names = _results(workspace, variants, kept_out), {variant: file.name for variant, file in files.items()}
    return About(config.publish.repo or config.name, location, config, results, chats, mirrors or {}, names)


def _results(workspace: Workspace, variants: tuple[str, ...], kept_out: tuple[str, ...]) -> Results:
    return Results.read(workspace.results_path).released(variants, kept_out)
