"""The files of a checkpoint beside its weights: which belong to it, their digest, and copying them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.models.chat_templates import DEFAULT, chat_templates, write_chat_templates
from pipeline.models.safe_loading import parse_settings, read_settings
from pipeline.models.tokenizer_settings import SETTINGS_FILES, TEMPLATES, real_path, to_publish
from pipeline.system.files import fingerprint

# Everything in a repository that belongs to the checkpoint at its root, and no pickle among it.
CHECKPOINT_FILES = re.compile(
    rf"^([\w.-]+\.(safetensors|json|jinja|model|txt|tiktoken)|README\.md|{TEMPLATES}/[\w.-]+\.jinja)\Z"
)
TERMS_FILES = re.compile(r"^(LICEN[CS]E|USE_POLICY|NOTICE)[\w.-]*\Z", re.IGNORECASE)  # they go where the model goes
TOKENIZER_FILES = re.compile(
    r"^(tokenizer[\w.-]*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"chat_template\.jinja|[\w.-]+\.tiktoken)$"
)
MODEL_FILES = re.compile(  # those that another model would have otherwise
    rf"^([\w.-]+\.safetensors(\.index\.json)?|config\.json|generation_config\.json|[\w.-]+\.model)$|{TOKENIZER_FILES.pattern}"
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def stored_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights on disk in bytes, or of its GGUF file."""
    names = [path.name for path in folder.iterdir()]
    if SINGLE in names or INDEX in names:
        files = weight_names(folder, names, lambda name: (folder / name).read_bytes())
    else:
        files = [name for name in names if name.endswith(".gguf")]
    return sum((folder / name).stat().st_size for name in files)


def model_digest(files: Mapping[str, str]) -> str:
    """Return a digest of the model at the root of a folder or repository, from the hashes of its files by path."""
    return fingerprint({path: digest for path, digest in files.items() if MODEL_FILES.match(path)})


def companions(source: Path) -> list[Path]:
    """Return the tokenizer, chat template, generation settings and terms of use beside a checkpoint."""
    return [
        path
        for path in sorted(source.iterdir())
        if TOKENIZER_FILES.match(path.name) or TERMS_FILES.match(path.name) or path.name == "generation_config.json"
        if path.is_file()
    ]


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights and configuration, with every chat template."""
    for path in companions(source):
        shutil.copyfile(real_path(path), target / path.name)
    for settings in (target / name for name in SETTINGS_FILES):
        told = read_settings(settings) if settings.is_file() else {}
        if (kept := to_publish(told)) != told:
            settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(templates := chat_templates(source)) > 1 or (templates and DEFAULT not in templates):
        write_chat_templates(target, templates)


def copy_terms(source: Path, target: Path) -> None:
    """Copy the terms of use beside a checkpoint, which go with its weights."""
    for path in companions(source):
        if TERMS_FILES.match(path.name):
            shutil.copyfile(real_path(path), target / path.name)


def read_config(folder: Path) -> dict:
    """Return the `config.json` of a checkpoint as plain data."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json, so this is not a model's folder")
    return read_settings(folder / "config.json")


def weight_names(place: object, names: Collection[str], read: Callable[[str], bytes], prefix: str = "") -> list[str]:
    """Return the files that transformers reads weights from: the single one, or those of the index.

    Args:
        place: the model, for errors.
        names: paths of the files that are there.
        read: returns the content of a small file.
        prefix: beginning of the paths of this model's files.

    Raises:
        ModelError: if there are no such files.
    """
    single, index = f"{prefix}{SINGLE}", f"{prefix}{INDEX}"
    if single in names:
        return [single]
    if index not in names:
        others = [name for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
        found = sorted(n for n in others if n.endswith(".safetensors") and n not in ADAPTER_FILES)
        if not found:
            raise ModelError(f"{place}: no .safetensors at its root; pickled weights are not read")
        raise ModelError(f"{place}: no {single} and no {index}; other names are not read ({', '.join(found[:3])})")
    try:
        named = {str(file) for file in parse_settings(f"{place}/{index}", read(index))["weight_map"].values()}
    except (KeyError, TypeError, AttributeError):
        raise ModelError(f"{place}/{index}: not an index with a weight_map") from None
    if odd := sorted(file for file in named if "/" in file or not file.endswith(".safetensors")):
        raise ModelError(f"{place}/{index}: {odd[0]!r} is not the name of a file in this folder")
    files = sorted(f"{prefix}{file}" for file in named)
    if missing := [name for name in files if name not in names]:
        raise ModelError(f"{place}/{missing[0]}: named by the index, and missing")
    return files


def checkpoint_names(names: Iterable[str], weights: Collection[str], prefix: str = "") -> list[str]:
    """Return the files of a repository that are downloaded with a model: these weights, and what is beside them."""
    own = (name for name in names if name.startswith(prefix))
    return [
        name
        for name in own
        if name in weights or (not name.endswith(WEIGHTS) and belongs_to_checkpoint(name.removeprefix(prefix)))
    ]


def belongs_to_checkpoint(name: str) -> bool:
    """Return True if a file beside the weights belongs to the checkpoint; adapter files do not."""
    return name not in ADAPTER_FILES and bool(CHECKPOINT_FILES.match(name) or TERMS_FILES.match(name))
