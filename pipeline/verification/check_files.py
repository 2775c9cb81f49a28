"""The check of the files: each has the hash in the lineage, and no other file would be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.config.catalog import is_one_file
from pipeline.hub.tree import LINEAGE
from pipeline.models.checkpoint_files import TOKENIZER_FILES
from pipeline.verification.findings import Finding, Verdict, right, unknown, wrong
from pipeline.verification.lineage_claims import ADAPTER, Claims, File
from pipeline.verification.location import Place

# Files that loaders run, or load by their names alone.
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|h5|msgpack|npy|npz)\Z", re.IGNORECASE)
CODE = re.compile(r".*\.(py|pyc|so|dll)\Z", re.IGNORECASE)
WEIGHTS = re.compile(r".*\.(safetensors|safetensors\.index\.json|bin\.index\.json|gguf|onnx)\Z", re.IGNORECASE)
LARGEST_DOCUMENT = 2_000_000  # bytes; larger ones are not read
TEMPLATES = "additional_chat_templates/"  # a tokenizer loads every file in it
SETTINGS = re.compile(r"(config|generation_config|adapter_config|processor_config|preprocessor_config)\.json\Z")


def check_files(claims: Claims, place: Place) -> list[Finding]:
    """Return a finding for each wrong file, and one for each folder in which all files are correct.

    The Hub tells the hashes of large files. Small files of a repository are downloaded.
    """
    small = [path for path in claims.files if path in place.sizes and not place.is_large(path)]
    whole = [path for path in small if place.sizes[path] == claims.files[path].size]  # the others are wrong anyway
    documents = [path for path in claims.documents if path in place.sizes]
    too_large = [path for path in documents if place.sizes[path] > LARGEST_DOCUMENT]
    place.bring([LINEAGE, *whole, *(path for path in documents if path not in too_large)])
    found = [wrong("files", path, f"{place.sizes[path]:,} bytes, more than any document of ours") for path in too_large]
    total, done = sum(file.size for file in claims.files.values()), 0
    for path, file in claims.files.items():
        if problem := _problem(claims, place, path, file):
            found.append(wrong("files", path, problem))
        done += file.size
        place.tell(done, total, "checking hashes")
    found += [wrong("files", path, "missing") for path in claims.documents if path not in place.sizes]
    found += _unnamed(claims, place)
    return found + list(_all_right(claims, found))


def _problem(claims: Claims, place: Place, path: str, file: File) -> str | None:
    if PICKLES.match(path):
        return "a pickle, which tunepress never writes and never loads"
    if path not in place.sizes:
        return "missing"
    there = place.sizes[path]
    if there != file.size:
        is_anothers = any(there == other.size for other in claims.files.values())
        other = _whose(claims, path, place.digest(path)) if is_anothers else None
        problem = "cut short" if there < file.size else "longer than published"
        return other or f"{problem}: {there:,} bytes; by the lineage {file.size:,}"
    digest = place.digest(path)
    if digest == file.sha256:
        return None
    changed = f"changed: sha256 {str(digest)[:12]}...; by the lineage {file.sha256[:12]}..."
    return _whose(claims, path, digest) or changed


def _whose(claims: Claims, path: str, digest: str | None) -> str | None:
    """Return the problem of a file that holds the content of another one."""
    other = next((name for name, file in claims.files.items() if file.sha256 == digest and name != path), None)
    return f"swapped: it has the content of {other}" if other else None


def _unnamed(claims: Claims, place: Place) -> Iterator[Finding]:
    """Yield a finding for each file that the lineage does not name and that would be loaded, or looks so.

    A folder in which the lineage names no file gets one finding. In the repository of the source model, other folders
    and the root are its author's.
    """
    ours = {claims.prefix(model) for model in claims.models}
    ours |= {path[: path.rfind("/") + 1] for path in claims.files}
    named = {*claims.files, *claims.documents, LINEAGE}
    foreign: dict[str, list[str]] = {}
    for path in sorted(place.sizes.keys() - named):
        folder, name = path[: path.rfind("/") + 1], path[path.rfind("/") + 1 :]
        is_template = folder.endswith(TEMPLATES) and folder.removesuffix(TEMPLATES) in ours and name.endswith(".jinja")
        if folder not in ours and not is_template:
            if PICKLES.match(name) or WEIGHTS.match(name):
                foreign.setdefault(folder, []).append(path)
        elif PICKLES.match(name):
            yield wrong("files", path, "a pickle that the lineage does not name; loading it can run any code")
        elif CODE.match(name):
            yield wrong("files", path, "code that the lineage does not name; tunepress publishes and runs none")
        elif WEIGHTS.match(name):
            yield wrong("files", path, "weights that the lineage does not name")
        elif is_template or SETTINGS.match(name) or TOKENIZER_FILES.match(name):
            yield wrong("files", path, "loaded with the model, and not named by the lineage")
    for folder, paths in foreign.items():
        if _is_in_source(claims, place):
            for path in paths:
                yield unknown("files", path, "of the source model, not of this release, so nothing is known about it")
        else:
            some = ", ".join(path.removeprefix(folder) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
            yield wrong("files", folder or "root", f"models that the lineage does not name ({some})")


def _is_in_source(claims: Claims, place: Place) -> bool:
    """Return True if the release consists of variants in the repository of their source model."""
    home = claims.results.origin.hub_id
    return not claims.has_root and (home or "").casefold() == place.name.casefold()


def _all_right(claims: Claims, found: list[Finding]) -> Iterator[Finding]:
    bad = {finding.subject for finding in found}
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in claims.files):
        own = [path for path in claims.files if path.rpartition("/")[0] == folder]
        if not bad & set(own):
            size = sum(claims.files[path].size for path in own)
            yield right("files", f"{folder}/" if folder else "root", f"{len(own)} files, {size:,} bytes, as published")


def sound_models(claims: Claims, found: list[Finding]) -> list[str]:
    """Return the models that may be loaded: their folders, and those of models that they need, have no defect."""
    bad = {finding.subject for finding in found if finding.verdict is Verdict.wrong}

    def is_sound(model: str) -> bool:
        others = claims.files.keys() - claims.files_of(model).keys() if is_one_file(model) else set()
        folders = {path[: path.rfind("/") + 1].removesuffix(TEMPLATES) for path in bad - others}
        if claims.prefix(model) in folders:
            return False
        needs = claims.reference if is_one_file(model) or model == ADAPTER else None
        return needs is None or is_sound(needs)

    return [model for model in claims.models if is_sound(model)]
