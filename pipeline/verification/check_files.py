"""The check of the files: all that the lineage names, by hash, and none beside them that a loader would take."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.config.catalog import is_one_file
from pipeline.hub.tree import LINEAGE
from pipeline.models.checkpoint_files import TOKENIZER_FILES
from pipeline.verification.findings import Finding, Verdict, right, unknown, wrong
from pipeline.verification.lineage_claims import ADAPTER, Claims, File
from pipeline.verification.location import Place

# What loaders run, and what they take besides what the lineage names, by its name alone.
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|h5|msgpack|npy|npz)\Z", re.IGNORECASE)
CODE = re.compile(r".*\.(py|pyc|so|dll)\Z", re.IGNORECASE)
WEIGHTS = re.compile(r".*\.(safetensors|safetensors\.index\.json|bin\.index\.json|gguf|onnx)\Z", re.IGNORECASE)
LARGEST_DOCUMENT = 2_000_000  # bytes; others are not read
TEMPLATES = "additional_chat_templates/"  # all that lie in it beside a tokenizer are taken
SETTINGS = re.compile(r"(config|generation_config|adapter_config|processor_config|preprocessor_config)\.json\Z")


def check_files(claims: Claims, place: Place) -> list[Finding]:
    """A line for every file that is not as it should be, and one for each folder in which all are.

    Of a repository, hashes that the Hub tells are looked at first; what it does not tell them of is small, and fetched.
    """
    small = [path for path in claims.files if path in place.sizes and not place.is_large(path)]
    whole = [path for path in small if place.sizes[path] == claims.files[path].size]  # others need not be read
    documents = [path for path in claims.documents if path in place.sizes]
    too_large = [path for path in documents if place.sizes[path] > LARGEST_DOCUMENT]
    place.bring([LINEAGE, *whole, *(path for path in documents if path not in too_large)])
    found = [wrong("files", path, f"{place.sizes[path]:,} bytes, which no document of ours has") for path in too_large]
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
        return "the lineage names a pickle, which tunepress never writes and never loads"
    if path not in place.sizes:
        return "missing"
    there = place.sizes[path]
    if there != file.size:
        is_anothers = any(there == other.size for other in claims.files.values())
        other = _whose(claims, path, place.digest(path)) if is_anothers else None
        what = "cut short" if there < file.size else "longer than it was"
        return other or f"{what}: {there:,} bytes, and the lineage says {file.size:,}"
    digest = place.digest(path)
    if digest == file.sha256:
        return None
    what = f"changed: sha256 {str(digest)[:12]}..., and the lineage says {file.sha256[:12]}..."
    return _whose(claims, path, digest) or what


def _whose(claims: Claims, path: str, digest: str | None) -> str | None:
    """What to say of a file that holds what another should hold."""
    other = next((name for name, file in claims.files.items() if file.sha256 == digest and name != path), None)
    return f"swapped: it holds what {other} should hold" if other else None


def _unnamed(claims: Claims, place: Place) -> Iterator[Finding]:
    """What lies in the release's own folders, is not named, and would be loaded, or looks as if it would."""
    ours = {claims.prefix(model) for model in claims.models}
    ours |= {path[: path.rfind("/") + 1] for path in claims.files}
    named = {*claims.files, *claims.documents, LINEAGE}
    for path in sorted(place.sizes.keys() - named):
        folder, name = path[: path.rfind("/") + 1], path[path.rfind("/") + 1 :]
        is_template = folder.endswith(TEMPLATES) and folder.removesuffix(TEMPLATES) in ours and name.endswith(".jinja")
        if folder not in ours and not is_template:
            if PICKLES.match(name) or WEIGHTS.match(name):
                yield unknown("files", path, "not of this release, so nothing is known of it")
        elif PICKLES.match(name):
            yield wrong("files", path, "a pickle, which the lineage does not name; loading one can run anything")
        elif CODE.match(name):
            yield wrong("files", path, "code, which the lineage does not name; tunepress publishes none, and runs none")
        elif WEIGHTS.match(name):
            yield wrong("files", path, "weights that the lineage does not name")
        elif is_template or SETTINGS.match(name) or TOKENIZER_FILES.match(name):
            yield wrong("files", path, "would be loaded with the model, and the lineage does not name it")


def _all_right(claims: Claims, found: list[Finding]) -> Iterator[Finding]:
    bad = {finding.subject for finding in found}
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in claims.files):
        own = [path for path in claims.files if path.rpartition("/")[0] == folder]
        if not bad & set(own):
            size = sum(claims.files[path].size for path in own)
            yield right("files", f"{folder}/" if folder else "root", f"{len(own)} files, {size:,} bytes, as published")


def sound_models(claims: Claims, found: list[Finding]) -> list[str]:
    """The models that may be loaded: nothing was found in their folders, nor in those of models that they take."""
    bad = {finding.subject for finding in found if finding.verdict is Verdict.wrong}

    def is_sound(model: str) -> bool:
        others = claims.files.keys() - claims.files_of(model).keys() if is_one_file(model) else set()
        folders = {path[: path.rfind("/") + 1].removesuffix(TEMPLATES) for path in bad - others}
        if claims.prefix(model) in folders:
            return False
        needs = claims.reference if is_one_file(model) or model == ADAPTER else None
        return needs is None or is_sound(needs)

    return [model for model in claims.models if is_sound(model)]
